"""Files that can be made again: each ends with its length and hash, by which it is checked before it is used.

Behind the content stands one line of JSON, which readers of `.npy` and of JSON lines do not reach. A file that was cut
or changed is removed and made again, and a notice says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from spotlight_jax.files import replace_file

_MOST_FOOTER = 1 << 16  # bytes
_BLOCK = 1 << 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A sound file: bytes of its content, and what was noted as it was made."""

    size: int
    note: str


def write_derived(path: Path, content: Iterable[bytes], note: Callable[[], str] = lambda: "") -> Derived:
    """Write a file with its length and hash, whole or not at all.

    Args:
        note: asked when all content is written; kept in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with replace_file(path) as file:
        for block in content:
            file.write(block)
            digest.update(block)
            size += len(block)
        found = Derived(size, note())
        footer = {"bytes": size, "sha256": digest.hexdigest(), "note": found.note}
        file.write(b"\n" + json.dumps(footer).encode() + b"\n")
    return found


def find_derived(path: Path) -> Derived | None:
    """Return the file, if it is there and sound; one that is damaged is removed."""
    if not path.is_file():
        return None
    if (found := _check(path)) is None:
        _log.warning("'%s' is damaged and is made again", path)
        path.unlink(missing_ok=True)
    return found


def _check(path: Path) -> Derived | None:
    with path.open("rb") as file:
        length = path.stat().st_size
        file.seek(max(0, length - _MOST_FOOTER))
        end = file.read()
        start = end.rfind(b"\n", 0, -1)
        try:
            footer = json.loads(end[start + 1 :])
            found = Derived(int(footer["bytes"]), str(footer["note"]))
            wanted = str(footer["sha256"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if start < 0 or not end.endswith(b"\n") or found.size != length - len(end) + start:
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), found.size
        while left and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return found if digest.hexdigest() == wanted else None
