"""Selectors on disk: hash functions by name, with their config and the base model they belong to.

A selector folder holds `config.json`, `selector.safetensors` (for anyone), `orbax/` (the same arrays through Orbax)
and a model card. Loading reads the safetensors file; the two are checked to be equal by a test.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from spotlight_jax import hashing
from spotlight_jax.errors import InputError, naming
from spotlight_jax.fields import read_dataclass

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Selector:
    """Hash functions of every layer of one base model."""

    cfg: hashing.HashConfig
    shape: hashing.HeadShape
    params: hashing.HashParams
    base_model: str  # as it was named when the selector was trained
    info: dict[str, Any]  # recipe and metrics, for people


def flatten(params: hashing.HashParams) -> dict[str, jax.Array]:
    """Arrays by dotted name, such as `weights.keys.hidden_kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(entry.name for entry in path): leaf for path, leaf in leaves}


def save_selector(folder: pathlib.Path, selector: Selector, card: str) -> None:
    """Write a selector folder, Orbax and safetensors side by side."""
    arrays = flatten(selector.params)
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "orbax").absolute(), arrays, force=True)
    safetensors.numpy.save_file(
        {name: np.asarray(array) for name, array in arrays.items()}, folder / "selector.safetensors"
    )
    config = {
        "format": FORMAT,
        "base_model": selector.base_model,
        "hash": dataclasses.asdict(selector.cfg),
        "shape": dataclasses.asdict(selector.shape),
        **selector.info,
    }
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_selector(folder: str | pathlib.Path, shape: hashing.HeadShape | None = None) -> Selector:
    """Read a selector folder.

    Args:
        folder: what `save_selector` wrote, or a run folder that holds one as `selector/`.
        shape: of the base model it will serve; checked when given.

    Raises: InputError that names what is missing, broken, or different from the base model.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file() and (folder / "selector" / "config.json").is_file():
        folder = folder / "selector"
    config = _read_config(folder)
    with naming(f"'{folder / 'config.json'}' is not a selector's config"):
        cfg = read_dataclass(hashing.HashConfig, config.get("hash"))
        own = read_dataclass(hashing.HeadShape, config.get("shape"))
        if not isinstance(config.get("base_model", ""), str):
            raise InputError("base_model is no text")
    if shape is not None:
        check_shape(own, shape, f"selector '{folder}' (trained for {config.get('base_model')})")
    seen: dict[str, Any] = {}

    def draw() -> list[jax.Array]:  # leaves alone: the tree's own class takes arrays, not their shapes
        drawn = hashing.init_params(jax.random.key(0), cfg, own)
        seen.update(names=list(flatten(drawn)), structure=jax.tree.structure(drawn))
        return jax.tree.leaves(drawn)

    shapes = jax.eval_shape(draw)
    template = dict(zip(seen["names"], shapes, strict=True))
    arrays = _read_arrays(folder / "selector.safetensors", template)
    params = jax.tree.unflatten(seen["structure"], [jax.numpy.asarray(arrays[name]) for name in template])
    known = ("format", "base_model", "hash", "shape")
    info = {name: value for name, value in config.items() if name not in known}
    return Selector(cfg=cfg, shape=own, params=params, base_model=config.get("base_model", ""), info=info)


def check_shape(own: hashing.HeadShape, model: hashing.HeadShape, what: str) -> None:
    """Raise InputError naming each size in which a selector or checkpoint differs from the base model."""
    names = [field.name for field in dataclasses.fields(own)]
    unequal = [f"{name} {getattr(own, name)} instead of {getattr(model, name)}" for name in names]
    unequal = [text for name, text in zip(names, unequal, strict=True) if getattr(own, name) != getattr(model, name)]
    if unequal:
        raise InputError(f"{what} does not fit this base model: it has {', '.join(unequal)}")


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"'{folder}' is no selector: it has no config.json; give the selector/ folder of a run")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and brackets without end
        raise InputError(f"'{file}' is not valid JSON; export the selector again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"'{file}' is not a selector's config of format {FORMAT}; export it with this version")
    return config


def _read_arrays(file: pathlib.Path, template: dict[str, Any]) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise InputError(f"'{file}' is missing; export the selector again")
    try:
        arrays = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"'{file}' cannot be read ({error}); it may be cut short: export the selector again") from None
    for name, leaf in template.items():
        if name not in arrays:
            raise InputError(f"'{file}' holds no '{name}'; export the selector again")
        if arrays[name].shape != leaf.shape:
            raise InputError(f"'{file}': '{name}' is {arrays[name].shape}, its config asks for {leaf.shape}")
    return arrays
