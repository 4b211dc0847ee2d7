"""Dense attention and moments where the tokens of a cache lie on several devices (`token_axis`).

Runs under `shard_map` (`models.sharding.by_heads` on a mesh with `context`). Each device reads its own slots, and the
sums of softmax are added up; moments are of all tokens and the same on every device. Sparse steps are
`cached_attention.attend_sparsely`, as on a single device.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from spotlight_jax.cache import LayerCache
from spotlight_jax.cached_attention import BLOCK, MASKED, LayerSelector, remember
from spotlight_jax.moments import Moments, add_tokens, new_blocks


def attend_all_split(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    layer: LayerCache,
    selector: LayerSelector | None,
    starts: Int32[Array, "batch"],
    ends: Int32[Array, "batch"] | None = None,
    axis: str = "context",
) -> tuple[Float[Array, "batch q_len q_heads head_dim"], LayerCache]:
    """Return what `cached_attention.attend_chunk` and `attend_densely` do, from this device's part of the cache.

    Args:
        queries: of the new tokens, the same on all devices of the axis; so are keys, values and starts.
        layer: this device's slots; moments are of all, the same on all devices.
        selector: writes codes of the new tokens; None where the layer keeps none.
        starts: tokens each sequence has cached before.
        ends: tokens of each sequence with those of a chunk, its padding apart, which moments are then folded to; None:
            of a step, which `fold_split` does.
        axis: of the mesh, over which slots are split.
    """
    layer, q_len = remember(layer, keys, values, starts, selector, axis), queries.shape[1]
    if ends is not None and selector is not None and layer.moments is not None:
        filled = jnp.clip(ends, starts, starts + q_len)
        layer = dataclasses.replace(layer, moments=fold_split(layer, starts, filled, q_len, axis))
    return read_all_split(queries, layer, starts, axis), layer


def read_all_split(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    layer: LayerCache,
    starts: Int32[Array, "batch"],
    axis: str = "context",
) -> Float[Array, "batch q_len q_heads head_dim"]:
    """Return causal attention to a cache that holds the new tokens, from this device's part of it.

    Softmax is built up block by block over the filled slots that are this device's, and joined over the devices.
    Args as `attend_all_split`.
    """
    batch, q_len, q_heads, head_dim = queries.shape
    slots, kv_heads = layer.keys.shape[1:3]
    first, block = lax.axis_index(axis) * slots, min(BLOCK, slots)
    scaled = queries * jnp.asarray(head_dim**-0.5, queries.dtype)
    grouped = scaled.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    rows = starts[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None, :]

    def add_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total, acc = carry
        at = jnp.minimum(index * block, slots - block)  # the last block may overlap the one before it
        own_keys, own_values = (lax.dynamic_slice_in_dim(held, at, block, 1) for held in (layer.keys, layer.values))
        places = at + jnp.arange(block, dtype=jnp.int32)[None, None, :]
        visible = (first + places <= rows[:, :, None]) & (places >= index * block)
        logits = jnp.einsum("bkgtd,bskd->bkgts", grouped, own_keys, preferred_element_type=jnp.float32)
        logits = jnp.where(visible[:, None, None], logits, MASKED)
        raised = jnp.maximum(m, logits.max(axis=-1))
        p, alpha = jnp.exp(logits - raised[..., None]), jnp.exp(m - raised)
        mixed = jnp.einsum(
            "bkgts,bskd->bkgtd", p.astype(own_values.dtype), own_values, preferred_element_type=jnp.float32
        )
        return raised, total * alpha + p.sum(axis=-1), acc * alpha[..., None] + mixed

    filled = jnp.clip(jnp.max(starts) + q_len - first, 0, slots)
    shape = grouped.shape[:-1]
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape))
    m, total, acc = lax.fori_loop(0, (filled + block - 1) // block, add_block, start)
    share = jnp.exp(m - lax.pmax(m, axis))  # 0 where a query sees nothing of what lies here
    total, acc = lax.psum((total * share, acc * share[..., None]), axis)
    out = (acc / total[..., None]).transpose(0, 3, 1, 2, 4)
    return out.reshape(queries.shape).astype(queries.dtype)


def fold_split(
    layer: LayerCache,
    starts: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    tokens: int = 1,
    axis: str = "context",
) -> Moments:
    """Return what `moments.fold` does, from this device's part of the cache: the very numbers, on all devices.

    Each device gives its own slots of the blocks that became full, and zeros elsewhere; their sum is those blocks.

    Args:
        layer: this device's slots, and moments of what `starts` tokens filled.
        starts: lengths before.
        ends: lengths after; no less, and at most `tokens` more.
        tokens: the most that are new.
        axis: of the mesh, over which slots are split.
    """
    assert layer.moments is not None, "a layer without moments folds nothing"
    slots = layer.keys.shape[1]
    positions, is_new = new_blocks(starts, ends, tokens, slots * int(lax.psum(1, axis)))
    own = positions - lax.axis_index(axis) * slots
    is_own, at = (own >= 0) & (own < slots), jnp.clip(own, 0, slots - 1)

    def gather(held: Array) -> Array:
        rows = jnp.take_along_axis(held, at[..., None, None], axis=1)
        return lax.psum(jnp.where(is_own[..., None, None], rows, jnp.zeros((), held.dtype)), axis)

    return add_tokens(layer.moments, gather(layer.keys), gather(layer.values), is_new)
