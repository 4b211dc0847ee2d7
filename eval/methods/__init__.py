"""The methods by the names that `--methods` takes; a new one is a file here, a line below, and a test.

A method outside this package is named MODULE:FUNCTION, where FUNCTION is what `open_FILE` is here.
"""

import re

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


_OUTSIDE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # MODULE:FUNCTION

TAIL = "+tail"  # after a method's name: what it does not read is estimated
OF_SELECTOR = ("spotlight", f"spotlight{TAIL}")  # methods that take the hash functions of --selector


def has_tail(name: str) -> bool:
    """Return whether a method estimates what it does not read: spotlight+tail, oracle-mass+tail@FOLDER."""
    return base_name(name).endswith(TAIL)


def base_name(name: str) -> str:
    """Return a method's name without the selector's folder: spotlight of spotlight@FOLDER."""
    return name.partition("@")[0]


def plain_name(name: str) -> str:
    """Return a method's name in `METHODS`, without tail and folder: spotlight of spotlight+tail@FOLDER."""
    return base_name(name).removesuffix(TAIL)


def check_names(names: tuple[str, ...]) -> None:
    """Raise InputError for a name that no method has, or for one given twice."""
    for name in names:
        base, (_, at, folder) = plain_name(name), name.partition("@")
        if at and (base != "spotlight" or not folder):
            raise InputError(f"'{name}' names a selector's folder; only spotlight@FOLDER and spotlight+tail@FOLDER do")
        if has_tail(name) and base in UNBUDGETED:
            raise InputError(f"method '{base}' leaves nothing to estimate; give '{base}' without {TAIL}")
        if base in _RENAMED:
            raise InputError(f"method '{base}' is called '{_RENAMED[base]}'")
        if base not in METHODS and not _OUTSIDE.fullmatch(base):
            raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}")
    if not names or len(set(names)) < len(names):
        raise InputError("give --methods at least one name, each once")
