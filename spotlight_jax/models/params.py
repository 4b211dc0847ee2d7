"""Filling a decoder's parameter tree from a stream of named arrays, with every shape checked."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, param_shapes

Path = tuple[str, ...]  # of a leaf in the parameter tree
HEAD: Path = ("head", "kernel")


def default_dtype() -> Any:
    """bfloat16 on an accelerator, float32 on a CPU (where XLA's products run best in float32)."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def resolve_dtype(name: str) -> jnp.dtype:
    """The dtype that a `--dtype` flag names; `auto`: `default_dtype()`."""
    return jnp.dtype(default_dtype() if name == "auto" else name)


def fill_params(
    weights: Iterable[tuple[str, np.ndarray]],
    name_of: Callable[[Path], str],
    cfg: DecoderConfig,
    dtype: Any,
    source: str,
) -> Params:
    """The parameter tree on the default device, from named arrays taken one at a time.

    Args:
        weights: the format's name and value of every tensor; matrices are `[out, in]`, as all formats store them.
        name_of: the format's name of a leaf.
        cfg: the decoder's.
        dtype: of the result; None: `default_dtype()`.
        source: the model's name in error lines.

    Raises:
        InputError: a missing, unexpected, repeated or wrongly shaped tensor.
    """
    dtype = default_dtype() if dtype is None else dtype
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(cfg, dtype))
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    paths = {name_of(path): path for path in shapes}
    filled: dict[Path, jax.Array] = {}
    for name, value in weights:
        if cfg.tied and name == name_of(HEAD):
            continue  # some tied checkpoints store their head as well; the config decides
        if name not in paths:
            raise InputError(f"{source}: tensor {name} is unexpected: the config has no place for it")
        path = paths[name]
        shape = shapes[path][::-1] if path[-1] == "kernel" else shapes[path]
        if value.shape != shape:
            raise InputError(f"{source}: tensor {name} has shape {value.shape}, the config wants {shape}")
        if path in filled:
            raise InputError(f"{source}: tensor {name} appears twice")
        filled[path] = jnp.asarray(value.T if path[-1] == "kernel" else value, dtype)
    missing = [name for name, path in paths.items() if path not in filled]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{source}: tensors missing: {', '.join(missing[:3])}{more}; the model is incomplete")
    return jax.tree.unflatten(tree, [filled[path] for path in shapes])
