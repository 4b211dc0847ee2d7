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
TABLE: Path = ("embed", "table")


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
    """The parameter tree on the default device, from named arrays taken one at a time; all values are finite.

    A tied decoder's table may be stored under its head's name alone, as safetensors' own `save_model` writes it.

    Args:
        weights: the format's name and value of every tensor; matrices are `[out, in]`, as all formats store them.
        name_of: the format's name of a leaf.
        cfg: the decoder's.
        dtype: of the result; None: `default_dtype()`.
        source: the model's name in error lines.

    Raises:
        InputError: a missing, unexpected, repeated or wrongly shaped tensor, or one with NaN or Inf in it.
    """
    dtype = default_dtype() if dtype is None else dtype
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(cfg, dtype))
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    paths = {name_of(path): path for path in shapes}
    filled: dict[Path, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    head = None  # that a tied checkpoint stores: instead of its table, or as well; then the table counts
    for name, value in weights:
        if cfg.tied and name == name_of(HEAD):
            head = value
            continue
        if name not in paths:
            raise InputError(f"{source}: tensor {name} is unexpected: the config has no place for it")
        path = paths[name]
        if path in filled:
            raise InputError(f"{source}: tensor {name} appears twice")
        filled[path] = _leaf(path, name, value, shapes[path], dtype, source)
        finite[name] = _is_finite(filled[path])
    if head is not None and TABLE not in filled:
        name = name_of(HEAD)
        filled[TABLE] = _leaf(TABLE, name, head, shapes[TABLE], dtype, source)
        finite[name] = _is_finite(filled[TABLE])
    missing = [name for name, path in paths.items() if path not in filled]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{source}: tensors missing: {', '.join(missing[:3])}{more}; the model is incomplete")
    if broken := [name for name, is_finite in jax.device_get(finite).items() if not is_finite]:
        raise InputError(
            f"{source}: tensor {broken[0]} holds NaN or Inf as {jnp.dtype(dtype).name} ({len(broken)} of {len(finite)} "
            "tensors do); load it in a wider dtype, or fetch the model again"
        )
    return jax.tree.unflatten(tree, [filled[path] for path in shapes])


def _leaf(path: Path, name: str, value: np.ndarray, wanted: tuple[int, ...], dtype: Any, source: str) -> jax.Array:
    """One leaf of the tree from a stored tensor."""
    shape = wanted[::-1] if path[-1] == "kernel" else wanted
    if value.shape != shape:
        raise InputError(f"{source}: tensor {name} has shape {value.shape}, the config wants {shape}")
    with np.errstate(over="ignore"):  # too large for the dtype is Inf, which is looked for
        return jnp.asarray(value.T if path[-1] == "kernel" else value, dtype)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
