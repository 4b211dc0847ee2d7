"""The methods by the names that `--methods` takes; a new one is a file here, a line below, and a test."""

from collections.abc import Callable

from eval.methods.base import Method, Reading, ScoreMethod, Setting
from eval.methods.binary import open_binary
from eval.methods.dense import open_dense
from eval.methods.lsh import open_lsh
from eval.methods.magicpig import open_magicpig
from eval.methods.oracle import open_oracle
from eval.methods.quest import open_quest
from eval.methods.random import open_random
from eval.methods.spotlight import open_spotlight
from eval.methods.window import open_window
from spotlight_jax.checkpoint import Selector, load_selector
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.hashing import HeadShape
from spotlight_jax.models.config import nearest

__all__ = [
    "METHODS",
    "UNBUDGETED",
    "Method",
    "Reading",
    "ScoreMethod",
    "Setting",
    "base_name",
    "check_names",
    "open_method",
    "selector_of",
]

METHODS: dict[str, Callable[[str, Setting], Method]] = {
    "dense": open_dense,
    "oracle-scores": open_oracle,
    "oracle-mass": open_oracle,
    "oracle-query": open_oracle,
    "spotlight": open_spotlight,
    "lsh": open_lsh,
    "lsh-centred": open_lsh,
    "lsh-gaussian": open_lsh,
    "lsh-gaussian-centred": open_lsh,
    "quest": open_quest,
    "magicpig": open_magicpig,
    "window": open_window,
    "random": open_random,
    "binary": open_binary,
}

# What was called otherwise before it was named by what it ranks tokens by.
_RENAMED = {"oracle": "oracle-scores", "oracle-kv": "oracle-scores"}

# Methods for which no budget is asked, and what they read instead.
UNBUDGETED = {"dense": "everything", "magicpig": "as published"}


def base_name(name: str) -> str:
    """A method's name without the selector's folder: spotlight of spotlight@FOLDER."""
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


def selector_of(name: str, selector: Selector | None, shape: HeadShape) -> Selector | None:
    """The selector that a method reads by: the one in the folder that it names, else `selector`.

    Raises: InputError for an unknown name (with the nearest), or a folder without a selector for this shape.
    """
    check_names((name,))
    folder = name.partition("@")[2]
    return load_selector(folder, shape) if folder else selector


def open_method(
    name: str, selector: Selector | None, selection: SelectionConfig, shape: HeadShape, seed: int = 0
) -> Method:
    """A method ready for a model.

    Args:
        name: a key of `METHODS`, or spotlight@FOLDER for the selector in that folder.
        selector: for methods that need one, and for the number of bits of those that have codes.
        selection: sinks, recent tokens, dense layers and per; its share is not read here (see `attend`).
        shape: of the model's heads.
        seed: of what is drawn at random.

    Raises: InputError for an unknown name (with the nearest), or a method that misses its selector.
    """
    selector, base = selector_of(name, selector, shape), base_name(name)
    return METHODS[base](base, Setting(selection, shape, selector, seed))  # those of one base share compiled programs
