"""The methods by the names that `--methods` takes; a new one is a file here, a line below, and a test."""

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import nearest

# The file of each method, whose function `open_FILE` makes it. None is imported before it is opened: help needs no JAX.
METHODS = {
    "dense": "dense",
    "oracle-scores": "oracle",
    "oracle-mass": "oracle",
    "oracle-query": "oracle",
    "spotlight": "spotlight",
    "lsh": "lsh",
    "lsh-centred": "lsh",
    "lsh-gaussian": "lsh",
    "lsh-gaussian-centred": "lsh",
    "quest": "quest",
    "magicpig": "magicpig",
    "window": "window",
    "random": "random",
    "binary": "binary",
}

# What was called otherwise before it was named by what it ranks tokens by.
_RENAMED = {"oracle": "oracle-scores", "oracle-kv": "oracle-scores"}

# Methods for which no budget is asked, and what they read instead.
UNBUDGETED = {"dense": "everything", "magicpig": "as published"}


def base_name(name: str) -> str:
    """Return a method's name without the selector's folder: spotlight of spotlight@FOLDER."""
    return name.partition("@")[0]


def check_names(names: tuple[str, ...]) -> None:
    """Raise InputError for a name that no method has, or for one given twice."""
    for name in names:
        base, at, folder = name.partition("@")
        if at and (base != "spotlight" or not folder):
            raise InputError(f"'{name}' names a selector's folder; only spotlight@FOLDER does")
        if base in _RENAMED:
            raise InputError(f"method '{base}' is called '{_RENAMED[base]}'")
        if base not in METHODS:
            raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}")
    if not names or len(set(names)) < len(names):
        raise InputError("give --methods at least one name, each once")
