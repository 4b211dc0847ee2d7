"""Files that are written whole or not at all.

What is written goes to a temporary file beside the target, to the disk, and only then takes the target's name: a
process that is killed or a disk that is full leaves the file as it was before. Errors name the target.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from io import FileIO
from typing import Any, BinaryIO


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error.

    Raises: OSError with the path as its file name, whatever operation failed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with _naming(path):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file of these bytes."""
    with replace_file(path) as file:
        file.write(content)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any, indent: int | None = 2) -> None:
    """Write one JSON value."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def remove_partial(folder: pathlib.Path) -> None:
    """Remove what killed processes left half-written in a folder that no other process writes to now."""
    for file in folder.glob("*.partial"):
        file.unlink(missing_ok=True)


def append_lines(path: pathlib.Path, lines: str) -> None:
    """Add whole lines to the end of a file; a last line that was cut short before is taken off.

    Raises: OSError with the path as its file name; the file then ends as it did before.
    """
    with _naming(path), path.open("a+b", buffering=0) as file:  # a buffer would be written again on closing
        end = _end_of_lines(file)
        file.truncate(end)
        try:
            left = lines.encode()
            while left:
                left = left[file.write(left) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _end_of_lines(file: FileIO) -> int:
    """Return where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Let errors of the disk name the path: those of writing name none, those of renaming name the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the new name last; some file systems cannot, and then the name is as good as they make it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
