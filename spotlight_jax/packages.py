"""Pinned packages: one archive by name, version and hash, fetched and read, never built, installed or run."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from spotlight_jax.errors import InputError

Progress = Callable[[str, int, int], None]  # what is being done, done so far, in all


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned package on the Python package index."""

    name: str
    version: str
    sha256: str
    is_sdist: bool = False


def fetch_package(package: Package, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch a package's archive into a folder, from where pip and uv are configured to; its hash is verified.

    Args:
        progress: gets the bytes that are there and those of the whole.

    Raises: InputError when no index has the archive, none can be reached, or its hash is another.
    """
    from spotlight_jax import package_index  # its libraries take a second to load, and most runs fetch nothing

    what = f"fetching {package.name} {package.version}"

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    with package_index.open_index() as index:
        form = "sdist" if package.is_sdist else "wheel"
        for archive in index.find_archives(package.name, package.version, form, package.sha256):
            target = folder / Path(archive.filename).name
            if index.download(archive, target, show) and _sha256(target) == package.sha256:
                return target
            if target.exists():
                target.unlink()
                index.problems.append("its checksum is wrong")
        reason = (index.problems or ["no archive with its hash is where pip and uv are configured to look"])[0]
    raise InputError(
        f"cannot fetch {package.name} {package.version} ({reason}); check the network and the package index, "
        "or give files of your own"
    )


def print_quarters() -> Progress:
    """Return a function that shows the progress of a large archive on stderr: a line for each quarter."""
    printed = -1

    def show(what: str, done: int, total: int) -> None:
        nonlocal printed
        quarter = 4 * done // max(total, 1)
        if quarter > printed:
            printed = quarter
            print(f"{what}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB", file=sys.stderr, flush=True)

    return show


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
