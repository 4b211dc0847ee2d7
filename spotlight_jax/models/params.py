"""Filling a decoder's parameter tree from a stream of named tensors, with every shape checked."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, param_shapes
from spotlight_jax.models.sharding import Path, Placement

HEAD: Path = ("head", "kernel")
TABLE: Path = ("embed", "table")


@runtime_checkable
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
    """Return bfloat16 on an accelerator, float32 on a CPU (where XLA's products run best in float32)."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def resolve_dtype(name: str) -> jnp.dtype:
    """Return the dtype that a `--dtype` flag names; `auto`: `default_dtype()`."""
    return jnp.dtype(default_dtype() if name == "auto" else name)


def fill_params(
    weights: Iterable[tuple[str, Stored]],
    name_of: Callable[[Path], str],
    cfg: DecoderConfig,
    dtype: Any,
    source: str,
    placement: Placement | None = None,
) -> Params:
    """Fill the parameter tree from named tensors taken one at a time; all values are finite.

    Each device's part of a tensor is read by itself, so that the host never holds a whole one that is spread.

    Args:
        weights: the format's name and value of every tensor; matrices are `[out, in]`, as all formats store them.
        name_of: the format's name of a leaf.
        cfg: the decoder's.
        dtype: of the result; None: `default_dtype()`.
        source: the model's name in error lines.
        placement: where leaves lie, such as `models.sharding.weights_on` gives it; None: on the default device.

    Raises:
        InputError: as `match_leaves`, and a tensor with NaN or Inf in it.
    """
    dtype = default_dtype() if dtype is None else dtype
    filled: dict[Path, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for path, name, value in match_leaves(weights, name_of, cfg, source):
        filled[path] = _place_leaf(path, value, dtype, placement)
        finite[name] = _is_finite(filled[path])
    if broken := [name for name, is_finite in jax.device_get(finite).items() if not is_finite]:
        raise InputError(
            f"{source}: tensor {broken[0]} holds NaN or Inf as {jnp.dtype(dtype).name} ({len(broken)} of {len(finite)} "
            "tensors do); load it in a wider dtype, or fetch the model again"
        )
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(cfg, dtype))
    return jax.tree.unflatten(tree, [filled[tuple(key.key for key in path)] for path, _ in leaves])


def match_leaves(
    weights: Iterable[tuple[str, Stored]], name_of: Callable[[Path], str], cfg: DecoderConfig, source: str
) -> Iterator[tuple[Path, str, Stored]]:
    """Yield each tensor with the leaf of the parameter tree that it is, as they come; nothing of them is read.

    A tied decoder's table may be stored under its head's name alone, as safetensors' own `save_model` writes it.

    Raises:
        InputError: a missing, unexpected, repeated or wrongly shaped tensor.
    """
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(cfg, jnp.float32))
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    paths = {name_of(path): path for path in shapes}
    seen: set[Path] = set()
    head = None  # that a tied checkpoint stores: instead of its table, or as well; then the table counts

    def check(path: Path, name: str, value: Stored) -> tuple[Path, str, Stored]:
        shape = shapes[path][::-1] if path[-1] == "kernel" else shapes[path]
        if value.shape != shape:
            raise InputError(f"{source}: tensor {name} has shape {value.shape}, the config wants {shape}")
        seen.add(path)
        return path, name, value

    for name, value in weights:
        if cfg.tied and name == name_of(HEAD):
            head = value
            continue
        if name not in paths:
            raise InputError(f"{source}: tensor {name} is unexpected: the config has no place for it")
        if paths[name] in seen:
            raise InputError(f"{source}: tensor {name} appears twice")
        yield check(paths[name], name, value)
    if head is not None and TABLE not in seen:
        yield check(TABLE, name_of(HEAD), head)
    missing = [name for name, path in paths.items() if path not in seen]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{source}: tensors missing: {', '.join(missing[:3])}{more}; the model is incomplete")


def read_leaf(path: Path, value: Stored, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Read a leaf of the parameter tree on the host, or a slice of one, in the file's dtype."""
    index = (slice(None),) * len(value.shape) if index is None else index
    return value[index[::-1]].T if path[-1] == "kernel" else value[index]


def _place_leaf(path: Path, value: Stored, dtype: Any, placement: Placement | None) -> jax.Array:
    """Place a leaf of the parameter tree on its devices."""
    shape = value.shape[::-1] if path[-1] == "kernel" else value.shape
    with np.errstate(over="ignore"):  # too large for the dtype is Inf, which is looked for
        if placement is None:
            return jnp.asarray(read_leaf(path, value), dtype)
        sharding = placement(path, shape)
        parts: list[jax.Array] = []
        index, part = None, None  # read last: devices that hold the same part follow each other
        places = sharding.addressable_devices_indices_map(shape).items()
        for device, own in sorted(places, key=lambda pair: str(pair[1])):
            assert own is not None
            if index != own:
                part = None  # one part at a time
                index, part = own, np.asarray(read_leaf(path, value, own), dtype)
            parts.append(jax.device_put(part, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
