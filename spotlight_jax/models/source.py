"""What base models are called: names that mean the same in every folder, and those of old selectors, which may not."""

import os  # whose tests of paths say no where a name is too long for a file
import pathlib

from spotlight_jax.models.embedded import EMBEDDED
from spotlight_jax.models.presets import RANDOM

DEFAULT_MODEL = "smollm2-135m"


def lasting_name(source: str) -> str:
    """Return the same source by a name that does not depend on the working folder: a local path becomes absolute."""
    if source in EMBEDDED or source.startswith(RANDOM):
        return source
    path = pathlib.Path(source).expanduser()
    return str(path.resolve()) if os.path.exists(path) or path.suffix == ".gguf" else source


def find_again(name: str, folder: pathlib.Path) -> str | None:
    """Return what a relative name stood for that was written as it was given, in a run that `folder` belongs to.

    Such a name may be a path from the folder where the run was started, which holds the run more often than not, or a
    hub id. None where it stands in no folder around the run: nothing then says which of both it is.
    """
    if not name or name in EMBEDDED or name.startswith(RANDOM) or pathlib.Path(name).expanduser().is_absolute():
        return name or None
    around = [folder.resolve(), *folder.resolve().parents]
    found = (place / name for place in around)
    models = (path for path in found if os.path.isfile(path) or os.path.isfile(path / "config.json"))
    return next((str(path.resolve()) for path in models), None)
