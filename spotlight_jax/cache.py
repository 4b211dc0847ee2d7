"""What decoding remembers: keys, values and codes of each layer, appended in place.

Arrays are allocated once for a bucketed length and only ever written by slice updates, so that a jitted step which is
given its cache to keep (donated, or carried by a loop) writes the new rows where they belong and copies nothing.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from spotlight_jax.moments import Moments, empty_moments
from spotlight_jax.token_axis import first_slot

SMALLEST_BUCKET = 256
STEPS_PER_DOUBLING = 4  # long buckets grow by at most 25 %: fewer would waste memory, more would recompile
LANES = 128


@flax.struct.dataclass
class LayerCache:
    """One layer's cached tokens; slots past a sequence's length hold anything."""

    keys: Float[Array, "batch max_len kv_heads head_dim"]  # after RoPE
    values: Float[Array, "batch max_len kv_heads head_dim"]
    codes: UInt32[Array, "batch code_heads words max_len"] | None  # None: the layer is always read densely
    moments: Moments | None = None  # None: what is not read is not estimated


@flax.struct.dataclass
class Cache:
    """All layers, and how many slots each sequence has filled."""

    layers: tuple[LayerCache, ...]
    lengths: Int32[Array, "batch"]
    code_sets: Int32[Array, "batch"]  # which of the selector's sets of hash functions each sequence's codes are of

    @property
    def max_len(self) -> int:
        """Slots allocated for each sequence."""
        return self.layers[0].keys.shape[1]


def bucket_length(tokens: int) -> int:
    """Return the slots allocated for `tokens`: at least 256, a multiple of 128, at most 25 % more from 512 on."""
    if tokens <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    step = max(2 ** math.floor(math.log2(tokens - 1)) // STEPS_PER_DOUBLING, LANES)
    return -(-tokens // step) * step


def empty_layer(
    batch: int,
    max_len: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    code_shape: tuple[int, int] | None,
    has_moments: bool = False,
) -> LayerCache:
    """Return an unfilled layer.

    Args:
        batch: sequences.
        max_len: slots of each.
        kv_heads: KV heads.
        head_dim: size of a head.
        dtype: of keys and values.
        code_shape: (code_heads, words), or None for a layer without codes.
        has_moments: whether what is not read will be estimated.
    """
    shape = (batch, max_len, kv_heads, head_dim)
    codes = None if code_shape is None else jnp.zeros((batch, *code_shape, max_len), jnp.uint32)
    moments = empty_moments(batch, kv_heads, head_dim, dtype) if has_moments else None
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), codes, moments)


def _write(cached: Array, new: Array, starts: Int32[Array, "batch"], axis: int) -> Array:
    """Write each sequence's new rows from its own start on; `axis` is the axis of positions."""
    if cached.shape[0] == 1:
        return lax.dynamic_update_slice_in_dim(cached, new, starts[0], axis)
    return jax.vmap(lambda old, rows, start: lax.dynamic_update_slice_in_dim(old, rows, start, axis - 1))(
        cached, new, starts
    )


def append(
    layer: LayerCache,
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    codes: UInt32[Array, "batch code_heads words q_len"] | None,
    starts: Int32[Array, "batch"],
    axis: str | None = None,
) -> LayerCache:
    """Return the layer with new tokens at starts ... starts + q_len - 1 of each sequence; its moments stay as they are.

    The caller keeps starts + q_len within the allocated length: a write that does not fit would be moved to the left.

    Args:
        axis: over which slots are split (`token_axis`): each device gets the tokens whose slots are its own.
    """
    slots = layer.keys.shape[1]
    own = starts - first_slot(slots, axis)

    def write(held: Array, new: Array, place: int) -> Array:
        new = new.astype(held.dtype)
        return _write(held, new, own, place) if axis is None else _write_own(held, new, own, place)

    return dataclasses.replace(
        layer,
        keys=write(layer.keys, keys, 1),
        values=write(layer.values, values, 1),
        codes=layer.codes if layer.codes is None or codes is None else write(layer.codes, codes, 3),
    )


def _write_own(held: Array, new: Array, starts: Int32[Array, "batch"], place: int) -> Array:
    """Return what `held` has with those of the new rows that fit in; `starts` may lie before it or past it."""
    slots, q_len = held.shape[place], new.shape[place]
    width = min(q_len, slots)
    at = jnp.clip(starts, 0, slots - width)
    token = (at - starts)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]  # of each row from `at` on
    shape = [len(starts), *[1] * (new.ndim - 1)]
    shape[place] = width
    moved = jnp.take_along_axis(new, jnp.clip(token, 0, q_len - 1).reshape(shape), axis=place)
    old = jax.vmap(lambda row, first: lax.dynamic_slice_in_dim(row, first, width, place - 1))(held, at)
    is_new = ((token >= 0) & (token < q_len)).reshape(shape)
    return _write(held, jnp.where(is_new, moved, old), at, place)


def grow(cache: Cache, max_len: int) -> Cache:
    """Return the cache with slots for at least `max_len` tokens; copies once."""
    extra = max_len - cache.max_len
    if extra <= 0:
        return cache

    def widen(array: Array, axis: int) -> Array:
        return jnp.pad(array, [(0, extra if place == axis else 0) for place in range(array.ndim)])

    layers = tuple(
        dataclasses.replace(
            layer,
            keys=widen(layer.keys, 1),
            values=widen(layer.values, 1),
            codes=None if layer.codes is None else widen(layer.codes, 3),
        )
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=layers)


def resize(cache: Cache, max_len: int) -> Cache:
    """Return the cache with `max_len` slots for each sequence, more or fewer than it has; copies once."""
    if max_len >= cache.max_len:
        return grow(cache, max_len)
    return dataclasses.replace(cache, layers=cut(cache.layers, max_len))


def cut(layers: tuple[LayerCache, ...], max_len: int) -> tuple[LayerCache, ...]:
    """Return the first `max_len` slots of each layer."""
    return tuple(
        dataclasses.replace(
            layer,
            keys=layer.keys[:, :max_len],
            values=layer.values[:, :max_len],
            codes=None if layer.codes is None else layer.codes[..., :max_len],
        )
        for layer in layers
    )


def copy_tokens(
    target: tuple[LayerCache, ...],
    source: tuple[LayerCache, ...],
    target_row: Int32[Array, ""],
    target_start: Int32[Array, ""],
    source_row: Int32[Array, ""],
    source_start: Int32[Array, ""],
    length: int,
) -> tuple[LayerCache, ...]:
    """Return the target with `length` tokens of one sequence of the source, and with its moments whole.

    Args:
        target: layers to write to.
        source: layers of the same kinds; another batch and length.
        target_row: the sequence that is written.
        target_start: slot of the first token written.
        source_row: the sequence that is read.
        source_start: slot of the first token read.
        length: tokens.
    """

    def copy(old: Array, new: Array, axis: int) -> Array:
        def starts(row: Array, start: Array) -> list[Array]:
            return [row, *(start if place == axis else jnp.int32(0) for place in range(1, old.ndim))]

        sizes = [1, *(length if place == axis else new.shape[place] for place in range(1, new.ndim))]
        part = lax.dynamic_slice(new, starts(source_row, source_start), sizes)
        return lax.dynamic_update_slice(old, part, starts(target_row, target_start))

    def copy_row(old: Array, new: Array) -> Array:
        part = lax.dynamic_slice_in_dim(new, source_row, 1, axis=0)
        return lax.dynamic_update_slice_in_dim(old, part, target_row, axis=0)

    return tuple(
        LayerCache(
            keys=copy(old.keys, new.keys, 1),
            values=copy(old.values, new.values, 1),
            codes=None if old.codes is None or new.codes is None else copy(old.codes, new.codes, 3),
            moments=None if old.moments is None else jax.tree.map(copy_row, old.moments, new.moments),
        )
        for old, new in zip(target, source, strict=True)
    )
