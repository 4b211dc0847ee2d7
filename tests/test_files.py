"""Files are written whole or not at all; lines are added whole or not at all."""

import ast
import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from spotlight_jax import files

ROOT = Path(__file__).parent.parent


@pytest.fixture
def full_disk(monkeypatch):
    """A disk on which no file of this process grows past 100 bytes, as the system itself enforces it."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then ends in EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_is_written_is_read(tmp_path):
    files.write_text(tmp_path / "text", "é\n")
    files.write_json(tmp_path / "value.json", {"a": [1, None]})
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": [1, None]}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text", "value.json"]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "file"
    files.write_text(file, "before")
    with pytest.raises(KeyboardInterrupt), files.replace_file(file) as out:
        out.write(b"half")
        out.flush()
        assert file.read_text() == "before"
        raise KeyboardInterrupt
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_content_is_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: done.append("sync"))
    monkeypatch.setattr(files.os, "replace", lambda source, target: done.append("replace"))
    files.write_text(tmp_path / "file", "text")
    assert done == ["sync", "replace", "sync"]  # the content, the name, the folder that holds the name


def test_a_full_disk_leaves_the_file_as_it_was_and_is_told_by_its_name(tmp_path, full_disk):
    file = tmp_path / "file"
    files.write_text(file, "before")
    with pytest.raises(OSError) as caught:
        files.write_text(file, "x" * 200)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(file)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_line_that_a_full_disk_cuts_is_taken_back(tmp_path, full_disk):
    file = tmp_path / "lines"
    files.append_lines(file, "x" * 79 + "\n")
    with pytest.raises(OSError) as caught:
        files.append_lines(file, "y" * 79 + "\n")
    assert caught.value.filename == str(file) and file.read_text() == "x" * 79 + "\n"


@pytest.mark.parametrize("kept", ["", "one\n", "one\n" + "x" * 100_000 + "\n"])
def test_lines_never_join_one_that_was_cut_short(kept, tmp_path):
    file = tmp_path / "lines"
    file.write_text(kept + "y" * 200_000)
    files.append_lines(file, "two\nthree\n")
    assert file.read_text() == kept + "two\nthree\n"


def test_a_folder_that_is_missing_is_named_with_the_file(tmp_path):
    for write in (files.write_text, files.append_lines):
        with pytest.raises(FileNotFoundError) as caught:
            write(tmp_path / "no" / "file", "text\n")
        assert caught.value.filename == str(tmp_path / "no" / "file")


def _writes_in_place(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
    owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if name in ("write_text", "write_bytes"):
        return owner not in ("files", "")
    modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return name == "open" and any(set("wax") & set(mode) and len(mode) < 4 for mode in modes)


# Files of temporary folders and of no name yet: they are renamed when they are whole.
_TEMPORARY = {"train/demo.py", "spotlight_jax/files.py", "spotlight_jax/models/embedded.py"}
_TEMPORARY |= {"spotlight_jax/texts.py", "spotlight_jax/encoding.py"}


def test_every_file_is_written_by_these_functions():
    for top in ("spotlight_jax", "train", "eval"):
        for file in (ROOT / top).rglob("*.py"):
            if file.relative_to(ROOT).as_posix() not in _TEMPORARY:
                found = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if _writes_in_place(node)]
                assert not found, f"{file}: lines {found} write a file in place; use spotlight_jax/files.py"


def test_nothing_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        files.write_text(tmp_path / "file", "text")
        files.append_lines(tmp_path / "lines", "line\n")
    assert len(os.listdir("/proc/self/fd")) == before
