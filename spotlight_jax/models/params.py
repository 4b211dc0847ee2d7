"""Filling a decoder's parameter tree from a stream of named arrays, with every shape checked."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, param_shapes
from spotlight_jax.models.sharding import Path, weight_sharding

HEAD: Path = ("head", "kernel")
TABLE: Path = ("embed", "table")


class Stored(Protocol):
    """A tensor of a file, of which parts can be read: a NumPy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        ...

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
        """Read one slice of each axis."""
        ...


def default_dtype() -> Any:
    """bfloat16 on an accelerator, float32 on a CPU (where XLA's products run best in float32)."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def resolve_dtype(name: str) -> jnp.dtype:
    """The dtype that a `--dtype` flag names; `auto`: `default_dtype()`."""
    return jnp.dtype(default_dtype() if name == "auto" else name)


def fill_params(
    weights: Iterable[tuple[str, Stored]],
    name_of: Callable[[Path], str],
    cfg: DecoderConfig,
    dtype: Any,
    source: str,
    mesh: Mesh | None = None,
) -> Params:
    """The parameter tree from named tensors taken one at a time; all values are finite.

    On a mesh, each device's part of a tensor is read by itself, so that the host never holds a whole one. A tied
    decoder's table may be stored under its head's name alone, as safetensors' own `save_model` writes it.

    Args:
        weights: the format's name and value of every tensor; matrices are `[out, in]`, as all formats store them.
        name_of: the format's name of a leaf.
        cfg: the decoder's.
        dtype: of the result; None: `default_dtype()`.
        source: the model's name in error lines.
        mesh: where the tree lies (`models.sharding`); None: on the default device.

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
        filled[path] = _leaf(path, name, value, shapes[path], dtype, source, mesh)
        finite[name] = _is_finite(filled[path])
    if head is not None and TABLE not in filled:
        name = name_of(HEAD)
        filled[TABLE] = _leaf(TABLE, name, head, shapes[TABLE], dtype, source, mesh)
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


def _leaf(
    path: Path, name: str, value: Stored, wanted: tuple[int, ...], dtype: Any, source: str, mesh: Mesh | None
) -> jax.Array:
    """One leaf of the tree from a stored tensor."""
    is_turned = path[-1] == "kernel"
    shape = wanted[::-1] if is_turned else wanted
    if value.shape != shape:
        raise InputError(f"{source}: tensor {name} has shape {value.shape}, the config wants {shape}")

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = value[index[::-1] if is_turned else index]
        return part.T if is_turned else part

    with np.errstate(over="ignore"):  # too large for the dtype is Inf, which is looked for
        if mesh is None:
            return jnp.asarray(read((slice(None),) * len(wanted)), dtype)
        sharding = weight_sharding(path, wanted, mesh)
        parts, last = [], None  # devices that hold the same part follow each other
        places = sharding.addressable_devices_indices_map(wanted).items()
        for device, index in sorted(places, key=lambda pair: str(pair[1])):
            if last is None or last[0] != index:
                last = None  # one part at a time
                last = index, np.asarray(read(index), dtype)
            parts.append(jax.device_put(last[1], device).block_until_ready())
    return jax.make_array_from_single_device_arrays(wanted, sharding, parts)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
