"""One file to documents, by its suffixes; expected texts are written by hand."""

import bz2
import gzip
import io
import json
import logging
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spotlight_jax import documents, text_files
from spotlight_jax.commands import completion
from spotlight_jax.errors import InputError

TEXTS = ['One line,\nand "another".\n', "Zwei Zeilen\u2028mit \u0085 und \u2029 darin"]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS))
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1)


def _csv(delimiter: str) -> str:
    rows = [f"{i}{delimiter}" + '"' + text.replace('"', '""') + '"\n' for i, text in enumerate(TEXTS)]
    return f"id{delimiter}text\n" + "".join(rows)


def _read(file, column="text"):
    return list(text_files.read_file(file, column))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.JSONL", LINES),
        ("x.ndjson", LINES),
        ("x.json", LINES),  # as data sets of the hub often have it
        ("x.json", ARRAY),
        ("x.Json", "\ufeff \n" + ARRAY),
        ("x.csv", _csv(",")),
        ("x.csv", "\ufeff" + _csv(",")),
        ("x.TSV", _csv("\t")),
    ],
)
def test_a_files_suffix_in_any_case_says_how_its_documents_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert _read(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix, compress, name):
    content = {"x.jsonl": LINES, "x.json": ARRAY, "x.csv": _csv(","), "x.txt": "plain"}[name]
    file = tmp_path / (name + suffix)
    file.write_bytes(compress(content.encode()))
    assert _read(file) == (["plain"] if name == "x.txt" else TEXTS)
    assert text_files.is_known(file)


def test_zstandard_is_read_too(tmp_path):
    with pa.output_stream(tmp_path / "x.jsonl.zst", compression="zstd") as out:
        out.write(LINES.encode())
    assert _read(tmp_path / "x.jsonl.zst") == TEXTS


def test_what_a_table_lacks_is_said_without_calling_it_unreadable(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError) as caught:
        _read(tmp_path / "x.parquet")
    assert str(caught.value).startswith(f"'{tmp_path / 'x.parquet'}' has no 'text', only 'body'; ")


def test_a_single_json_object_is_one_document(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"text": "alone"}, indent=2))
    assert _read(tmp_path / "x.json") == ["alone"]


@pytest.mark.parametrize("name", ["x.zip", "x.PDF", "x.arrow", "x.ipynb", "x.jsonl.zip", "x.npy.gz", "x.parquet.bz2"])
def test_a_file_of_a_kind_that_is_not_read_is_refused_by_name_before_anything_is_read(tmp_path, name):
    (tmp_path / name).write_text("text all the same")
    for given in (tmp_path / name, tmp_path / "x*"):
        with pytest.raises(InputError, match=rf"{name}': "):
            documents.find_sources([str(given)])


def test_what_a_folder_holds_besides_text_is_said_by_name(tmp_path, caplog):
    for name in ("a.txt", "b.JSONL", "c.json.gz", "picture.png", "deep.zip"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        (source,) = documents.find_sources([str(tmp_path)])
    assert [file.name for file in source.files] == ["a.txt", "b.JSONL", "c.json.gz"]
    assert caplog.messages == [f"'{tmp_path}': not read, by their suffix: deep.zip, picture.png"]


def test_a_mark_at_the_start_and_windows_line_ends_are_no_part_of_a_text_wherever_it_stands(tmp_path, monkeypatch):
    marked, expected = "\ufeffone\r\ntwo\rthree\r\n", "one\ntwo\rthree\n"
    (tmp_path / "x.txt").write_bytes(marked.encode())
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": marked}))
    (tmp_path / "x.json").write_text(json.dumps([{"text": marked}]))
    (tmp_path / "x.csv").write_bytes(f'text\r\n"{marked}"\r\n'.encode())
    pq.write_table(pa.table({"text": [marked]}), tmp_path / "x.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert _read(file) == [expected], file
    assert completion._read_text(tmp_path / "x.txt") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(marked.encode())))
    assert completion._read_text(completion.STDIN) == expected.removesuffix("\n")


def test_a_null_is_no_document_in_every_kind_of_rows(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert _read(file) == ["a", None, "b"], file


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.txt", b"text\0more", r"x.txt' holds null characters"),
        ("x.txt", "text".encode("utf-16"), r"x.txt' is not UTF-8 .*it is UTF-16"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x.jsonl:1' is not valid Unicode"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "a", "b": {"\\udfff": 1}}', r"x.jsonl:2' is not valid Unicode"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1' is JSON that is nested too deeply"),
        ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"x.jsonl:1' is not usable JSON"),
        ("x.json", b'[{"text": "a"}, 3]', r"x.json:2' is not a JSON object"),
        ("x.json", b'[{"text": "a"}', r"x.json' is not JSON"),
        ("x.json", b'{\n"text": \n', r"x.json' is not JSON .*line 3"),
        ("x.csv", b"id,body\n1,a\n", r"x.csv' has no 'text' in its first line"),
        ("x.csv", b"id,text\n1,a,b\n", r"x.csv' is not readable CSV"),
        ("x.csv", b"id,text\n1,\xff\n", r"x.csv' is not readable CSV"),
        ("x.txt.gz", b"not gzip", r"x.txt.gz' is damaged"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"x.txt.gz' is damaged"),
        ("x.txt.xz", b"not xz", r"x.txt.xz' is damaged"),
        ("x.txt.bz2", b"not bzip2", r"cannot read '.*x.txt.bz2'"),
        ("x.txt.zst", b"not zstandard", r"cannot read '.*x.txt.zst'"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file_and_row(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        _read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_line_of_json_is_one_line_to_every_reader_and_reads_back(tmp_path):
    row = {"text": "a\u2028b\u2029c\u0085d\x0ce\nf", "zh": "秋天"}
    line = text_files.json_line(row)
    assert len(line.splitlines()) == 1 and "秋天" in line
    assert json.loads(line) == row
    (tmp_path / "new.jsonl").write_text(2 * line)
    (tmp_path / "old.jsonl").write_text(2 * (json.dumps(row, ensure_ascii=False) + "\n"))
    for name in ("new.jsonl", "old.jsonl"):
        assert [found for found, _ in text_files.read_json_lines(tmp_path / name)] == [row, row]
        assert text_files.split_lines((tmp_path / name).read_text())[1:] == [
            (tmp_path / name).read_text().split("\n")[1]
        ]
