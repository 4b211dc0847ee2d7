"""Selectors on disk: hash functions by name, with their config and the base model they belong to.

A selector folder holds `config.json`, `selector.safetensors` (for anyone), `orbax/` (the same arrays through Orbax)
and a model card. Loading reads the safetensors file; the two are checked to be equal by a test.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from spotlight_jax import files, hub, manifest
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.errors import InputError, naming
from spotlight_jax.fields import read_dataclass
from spotlight_jax.models.source import DEFAULT_MODEL, find_again, lasting_name
from spotlight_jax.selector.base import HashFunctions, HeadShape
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.tail import init_tail

FORMAT = 2
_MOST_SETS = 16  # of hash functions for shorter sequences: far above what training makes
_STORED = {"bit_weights": "decode", "log_head_scale": "log_gain", "levels": "cells", "head_assignment": "members"}
_READ = ("config.json", "selector.safetensors")  # the files that loading reads


@dataclasses.dataclass(frozen=True)
class Selector:
    """Hash functions of every layer of one base model.

    What is fitted to long contexts is worse in short ones, so a selector may hold several sets of hash functions, each
    for sequences of some lengths; a sequence's final length says which one makes its codes.
    """

    shape: HeadShape
    """Layers, heads and head_dim of the model that it serves."""
    params: HashFunctions
    """Hash functions for sequences longer than all of `shorter`."""
    base_model: str
    """Name of the model that it was trained for."""
    info: dict[str, Any]
    """Recipe and metrics, for people."""
    positions: int | None = None
    """Tokens of the longest sequence that it was fitted to; None: not known."""
    is_base_certain: bool = True
    """False: base_model is as an old version wrote it, a hub id or a relative path."""
    shorter: tuple[tuple[int, HashFunctions], ...] = ()
    """Hash functions for sequences of at most so many tokens, ascending."""

    @property
    def cfg(self) -> HashConfig:
        """What kind of hash functions they are."""
        return self.params.cfg

    @property
    def sets(self) -> tuple[HashFunctions, ...]:
        """All sets of hash functions, those for the shortest sequences first."""
        return (*(params for _, params in self.shorter), self.params)

    def set_of(self, tokens: int) -> int:
        """Return which of `sets` a sequence uses that will have so many tokens at its end."""
        return sum(tokens > most for most, _ in self.shorter)


def stored_name(name: str) -> str:
    """Return the name that files hold an array by: that of the first version, so that all selectors load."""
    return _STORED.get(name, name)


def flatten(params: HashFunctions) -> dict[str, jax.Array]:
    """Return arrays by dotted name, such as `weights.keys.hidden_kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(stored_name(entry.name) for entry in path): leaf for path, leaf in leaves}


def save_selector(folder: pathlib.Path, selector: Selector, card: str) -> None:
    """Write a selector folder, Orbax and safetensors side by side.

    Args:
        folder: made where it is not there yet.
        selector: of training, `fit` or `load_selector`.
        card: text of the folder's README.md, such as `selector.card.write_card` writes.

    Raises:
        InputError: an array holds NaN or Inf.
        OSError: the folder cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in flatten(selector.params).items()}
    for most, params in selector.shorter:
        arrays |= {f"{_prefix(most)}{name}": np.asarray(array) for name, array in flatten(params).items()}
    for name, array in arrays.items():
        _check_finite(name, array, "it is not exported")
    folder.mkdir(parents=True, exist_ok=True)
    whole = safetensors.numpy.save(arrays)
    files.write_bytes(folder / "selector.safetensors", whole)
    config = {
        "format": FORMAT,
        "base_model": lasting_name(selector.base_model),
        "base_model_is_lasting": True,
        "positions": selector.positions,
        "shorter": [most for most, _ in selector.shorter],
        "tail": selector.params.tail is not None,
        "hash": dataclasses.asdict(selector.cfg),
        "shape": dataclasses.asdict(selector.shape),
        **selector.info,
    }
    files.write_text(folder / "README.md", card)
    _write_orbax(folder / "orbax", arrays)
    files.write_json(folder / "config.json", config)
    manifest.seal_folder(folder)


def _write_orbax(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays through Orbax, by way of a temporary folder: a full disk is then met in one line."""
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / "orbax"
        # this process writes alone: without a set of its own it would wait for the others of a run on several hosts
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(own, {own}, "selector") if jax.process_count() > 1 else None
        with ocp.StandardCheckpointer(**({} if alone is None else {"multiprocessing_options": alone})) as checkpointer:
            checkpointer.save(source, arrays)
        shutil.rmtree(folder, ignore_errors=True)
        for file in (path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(target, file.read_bytes())


def load_selector(folder: str | pathlib.Path, shape: HeadShape | None = None) -> Selector:
    """Read a selector from a folder or from the hub.

    Args:
        folder: what `save_selector` wrote, or a run folder that holds one as `selector/`, or `hf:owner/name` and
            `hf:owner/name@revision` of the hub, fetched once.
        shape: of the base model it will serve; checked when given.

    Raises: InputError that names what is missing, broken, or different from the base model.
    """
    name = str(folder)
    folder = hub.fetch_selector(name) if name.startswith(hub.PREFIX) else pathlib.Path(folder)
    if not os.path.isfile(folder / "config.json") and os.path.isfile(folder / "selector" / "config.json"):
        folder = folder / "selector"
    config = _read_config(folder)
    if (folder / manifest.FILE).is_file() and (damage := manifest.find_damage(folder, _READ)):  # old ones have none
        raise InputError(
            f"selector '{folder}' is damaged: {damage}; export it again with --resume (or, where you changed it "
            f"yourself, delete {manifest.FILE})"
        )
    with naming(f"'{folder / 'config.json'}' is not a selector's config"):
        cfg: HashConfig = read_dataclass(HashConfig, config.get("hash"))
        own = read_dataclass(HeadShape, config.get("shape"))
        if not isinstance(config.get("base_model", ""), str):
            raise InputError("base_model is no text")
        shorter = _check_lengths(config.get("positions"), config.get("shorter", []))
        has_tail = config.get("tail", False)  # old selectors have none
        if type(has_tail) is not bool:
            raise InputError("tail is neither true nor false")
    if shape is not None:
        check_shape(own, shape, f"selector '{folder}' (trained for {config.get('base_model')})")
    seen: dict[str, Any] = {}

    def draw() -> list[jax.Array]:  # leaves alone: the tree's own class takes arrays, not their shapes
        drawn = init_functions(jax.random.key(0), cfg, own)
        if has_tail:
            drawn = dataclasses.replace(drawn, tail=init_tail(own.layers, own.q_heads))
        seen.update(names=list(flatten(drawn)), structure=jax.tree.structure(drawn))
        return jax.tree.leaves(drawn)

    shapes = jax.eval_shape(draw)
    template = dict(zip(seen["names"], shapes, strict=True))
    prefixes = ["", *map(_prefix, shorter)]
    file = folder / "selector.safetensors"
    arrays = _read_arrays(file, {prefix + name: leaf for prefix in prefixes for name, leaf in template.items()})
    params, *others = (
        jax.tree.unflatten(seen["structure"], [jax.numpy.asarray(arrays[prefix + name]) for name in template])
        for prefix in prefixes
    )
    known = ("format", "base_model", "base_model_is_lasting", "positions", "shorter", "tail", "hash", "shape")
    info = {name: value for name, value in config.items() if name not in known}
    named = config.get("base_model", "")
    base = named if config.get("base_model_is_lasting") is True else find_again(named, folder)
    pairs = tuple(zip(shorter, others, strict=True))
    return Selector(own, params, base or named, info, _positions(config), bool(base), pairs)


def _check_lengths(positions: Any, shorter: Any) -> list[int]:
    """Return the lengths of shorter sequences that have hash functions of their own; raises InputError for bad ones."""
    if positions is not None and (type(positions) is not int or positions < 1):
        raise InputError("positions is no whole number of at least 1")
    if not isinstance(shorter, list) or len(shorter) > _MOST_SETS:
        raise InputError(f"shorter is no list of at most {_MOST_SETS} lengths")
    if not all(type(most) is int and most >= 1 for most in shorter):
        raise InputError("shorter holds what is no whole number of at least 1")
    if shorter and sorted({*shorter, positions or 0}) != [*shorter, positions or 0]:
        raise InputError(f"shorter is {shorter}; its lengths must ascend to below positions ({positions})")
    return shorter


def _prefix(most: int) -> str:
    """Return the prefix of names of arrays that are for sequences of at most so many tokens."""
    return f"up_to_{most}."


def _positions(config: dict[str, Any]) -> int | None:
    """Return the positions covered; selectors older than the field for them cover those of the windows they saw."""
    if "positions" in config:
        return config["positions"]
    try:
        return int(config["recipe"]["data"]["window"])
    except (KeyError, TypeError, ValueError):
        return None


def describe_range(selector: Selector, tokens: int) -> str | None:
    """Return what to say where a sequence of so many tokens passes the positions that a selector was fitted to."""
    if selector.positions is None or tokens <= selector.positions:
        return None
    return (
        f"this selector was fitted to positions up to {selector.positions:,} and the sequence goes to {tokens:,}; "
        f"beyond them it misses tokens that matter: train one with --length {tokens} or more"
    )


def choose_model(model: str | None, selectors: Mapping[str, Selector]) -> tuple[str, list[str]]:
    """Choose the model to run: the given one, or that which all selectors were trained for, or the default without any.

    Args:
        model: as the user named it.
        selectors: by the folders that the user gave.

    Returns: the model by a lasting name, and a line for each selector that was trained for another one.

    Raises: InputError where no model is given and the selectors do not say one.
    """
    if model is None:
        for folder, selector in selectors.items():
            if not selector.is_base_certain:
                raise InputError(
                    f"selector '{folder}' was trained for '{selector.base_model}', which may be a hub id or a folder "
                    "that is not where it was; give --model"
                )
        bases = {selector.base_model: folder for folder, selector in selectors.items()}
        if len(bases) > 1:
            told = " and ".join(f"'{folder}' for {base}" for base, folder in bases.items())
            raise InputError(f"the selectors were trained for different models: {told}; give --model")
        return next(iter(bases), DEFAULT_MODEL), []
    name = lasting_name(model)
    others = {folder: own.base_model for folder, own in selectors.items() if own.base_model not in (name, model)}
    remarks = [f"selector '{at}' was trained for {base}, and is used with {name}" for at, base in others.items()]
    return name, remarks


def check_shape(own: HeadShape, model: HeadShape, what: str) -> None:
    """Raise InputError naming each size in which a selector or checkpoint differs from the base model."""
    names = [field.name for field in dataclasses.fields(own)]
    unequal = [f"{name} {getattr(own, name)} instead of {getattr(model, name)}" for name in names]
    unequal = [text for name, text in zip(names, unequal, strict=True) if getattr(own, name) != getattr(model, name)]
    if unequal:
        raise InputError(f"{what} does not fit this base model: it has {', '.join(unequal)}")


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.isfile(file):  # also a name too long for a file
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
        if arrays[name].dtype != leaf.dtype:
            raise InputError(f"'{file}': '{name}' is {arrays[name].dtype} instead of {leaf.dtype}; export it again")
        _check_finite(name, arrays[name], f"'{file}' cannot be used: train it again")
    return arrays


def _check_finite(name: str, array: np.ndarray, so: str) -> None:
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise InputError(f"'{name}' of the hash functions holds NaN or infinite numbers; {so}")
