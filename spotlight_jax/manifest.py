"""The hashes of a folder's files, in the folder: what is read is what was written, or what differs is named."""

import hashlib
import json
import pathlib
from collections.abc import Collection

from spotlight_jax import files

FILE = "manifest.json"


def seal_folder(folder: pathlib.Path, names: Collection[str] | None = None) -> None:
    """Write the manifest of a folder whose files are all there, or of the files named alone."""
    found = sorted(_files_of(folder).items())
    files.write_json(folder / FILE, {name: _digest(file) for name, file in found if names is None or name in names})


def find_damage(folder: pathlib.Path, names: Collection[str] | None = None) -> str | None:
    """Return what is wrong with a sealed folder, or None where its files are as they were written.

    Args:
        folder: that `seal_folder` was called for; without a manifest it is not whole.
        names: the only files to look at; without it, all that the manifest names.
    """
    try:
        sealed = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {FILE}, so its writing was not finished"
    except (ValueError, RecursionError):
        return f"{FILE} is damaged"
    if not isinstance(sealed, dict) or not sealed:
        return f"{FILE} is damaged"
    found = _files_of(folder)  # what a damaged manifest may name besides is never opened
    for name, digest in sealed.items():
        if names is not None and name not in names:
            continue
        if name not in found:
            return f"{name} is missing"
        if _digest(found[name]) != digest:
            return f"{name} is not what was written"
    return None


def _files_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
