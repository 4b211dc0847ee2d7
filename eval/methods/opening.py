"""A method by its name, ready for a model."""

import importlib
from collections.abc import Callable

import jax

from eval.methods import METHODS, base_name, check_names, has_tail, plain_name
from eval.methods.base import Method, Setting
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, load_selector
from spotlight_jax.tail import init_tail


def selector_of(name: str, selector: Selector | None, shape: HeadShape) -> Selector | None:
    """Return the selector of a method: the one in the folder that it names, else `selector`.

    Raises: InputError for an unknown name (with the nearest), or a folder without a selector for this shape.
    """
    check_names((name,))
    folder = name.partition("@")[2]
    return load_selector(folder, shape) if folder else selector


def open_method(
    name: str, selector: Selector | None, selection: SelectionConfig, shape: HeadShape, seed: int = 0
) -> Method:
    """Open a method for a model.

    Args:
        name: a key of `METHODS`, spotlight@FOLDER for the selector in that folder, or MODULE:FUNCTION for a method
            outside this package; with +tail, what is not read is estimated, with the selector's corrections where it
            has some.
        selector: for methods that need one, and for the number of bits of those that have codes.
        selection: sinks, recent tokens, dense layers and per; its share is not read here (see `attend`).
        shape: of the model's heads.
        seed: of what is drawn at random.

    Raises: InputError for an unknown name (with the nearest), or a method that misses its selector.
    """
    selector, base = selector_of(name, selector, shape), plain_name(name)
    method: Method = _opener(base)(base, Setting(selection, shape, selector, seed))
    if has_tail(name):
        trained = None if selector is None else selector.params.tail
        tail = init_tail(shape.layers, shape.q_heads) if trained is None else jax.tree.map(jax.numpy.asarray, trained)
        method = method.replace(name=base_name(name), tail=tail)  # type: ignore[attr-defined]
    return method  # those of one base share compiled programs


def _opener(base: str) -> Callable[[str, Setting], Method]:
    """Return the function that opens a method; raises InputError where one outside this package is not found."""
    if base in METHODS:
        found: Callable[[str, Setting], Method] = getattr(
            importlib.import_module(f"eval.methods.{METHODS[base]}"), f"open_{METHODS[base]}"
        )
        return found
    module, _, function = base.partition(":")
    try:
        opener: Callable[[str, Setting], Method] | None = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise InputError(f"method '{base}': {error}; set PYTHONPATH to the folder that holds it") from None
    if opener is None:
        raise InputError(f"method '{base}': module '{module}' has no '{function}'")
    return opener
