"""Moments of a layer's cache: what its keys and values are like all together, kept as the cache grows.

Tokens are added a block at a time. The newest, those of a query's own block, are in no moment yet.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from spotlight_jax.token_axis import devices_of, first_slot, join_sums

BLOCK = 64  # tokens that are added together


@flax.struct.dataclass
class Moments:
    """Mean and scatter of a KV head's cached keys and values, all but each sequence's first token, in float32.

    A scatter is the sum of products of differences from the means, so that means far from zero cost no digits. What a
    step reads of it is the covariance, the scatter over the count, in the cache's type.
    """

    count: Float[Array, "batch"]
    mean: Float[Array, "batch kv_heads two_dims"]  # of keys, then of values
    scatter: Float[Array, "batch kv_heads two_dims head_dim"]  # of keys, then of values, with keys
    covariance: Float[Array, "batch kv_heads two_dims head_dim"]

    @property
    def key(self) -> Float[Array, "batch kv_heads head_dim"]:
        """Mean key."""
        return self.mean[..., : self.scatter.shape[-1]]

    @property
    def value(self) -> Float[Array, "batch kv_heads head_dim"]:
        """Mean value."""
        return self.mean[..., self.scatter.shape[-1] :]


def empty_moments(batch: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Moments:
    """Return moments of no tokens; dtype is the cache's."""
    shape = (batch, kv_heads, 2 * head_dim)
    square = (*shape, head_dim)
    return Moments(jnp.zeros((batch,)), jnp.zeros(shape), jnp.zeros(square), jnp.zeros(square, dtype))


def add_tokens(
    moments: Moments,
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    is_counted: Bool[Array, "batch q_len"],
) -> Moments:
    """Return moments with more tokens; chunk by chunk gives what all tokens at once give.

    The update is that of Chan, Golub and LeVeque (1979) for two sets of samples.

    Args:
        moments: of the tokens before.
        keys: after RoPE, as they are cached.
        values: of the same tokens.
        is_counted: False for what no moments hold, such as the first token of a sequence.
    """
    both = jnp.concatenate([keys, values], axis=-1).astype(jnp.float32)
    there = is_counted.astype(jnp.float32)[:, :, None, None]
    new = there.sum(axis=1)
    head_dim, old = keys.shape[-1], moments.count[:, None, None]
    total = jnp.maximum(old + new, 1.0)
    mean = (both * there).sum(axis=1) / jnp.maximum(new, 1.0)
    off, apart = (both - mean[:, None]) * there, mean - moments.mean
    added = jnp.einsum("btki,btkj->bkij", off, off[..., :head_dim], precision="highest")
    between = apart[..., :, None] * apart[..., None, :head_dim] * (old * new / total)[..., None]
    scatter = moments.scatter + added + between
    return Moments(
        count=moments.count + new[:, 0, 0],
        mean=moments.mean + apart * (new / total),
        scatter=scatter,
        covariance=(scatter / total[..., None]).astype(moments.covariance.dtype),
    )


def block_start(positions: Int32[Array, "*any"]) -> Int32[Array, "*any"]:
    """Return where the block of a position begins: the tokens before it are in the moments of a query there."""
    return positions // BLOCK * BLOCK


def with_newest(
    mask: Bool[Array, "batch q_len heads kv_len"],
    positions: Int32[Array, "batch q_len"],
    first: Int32[Array, ""] | int = 0,
) -> Bool[Array, "batch q_len heads kv_len"]:
    """Return which tokens queries read apart from those that were selected: the newest, which no moment has yet.

    Args:
        mask: of those that were selected.
        positions: of the queries.
        first: position of the mask's first token.
    """
    slots = first + jnp.arange(mask.shape[-1], dtype=jnp.int32)[None, None]
    is_newest = (slots >= block_start(positions)[..., None]) & (slots <= positions[..., None])
    return mask | is_newest[:, :, None]


def new_blocks(
    starts: Int32[Array, "batch"], ends: Int32[Array, "batch"], tokens: int, max_len: int
) -> tuple[Int32[Array, "batch window"], Bool[Array, "batch window"]]:
    """Return consecutive positions that hold the blocks which became full, and which positions are of those.

    Args:
        starts: lengths before.
        ends: lengths after; no less, and at most `tokens` more.
        tokens: the most that are new.
        max_len: slots of the cache.
    """
    window = min(-(-tokens // BLOCK) * BLOCK, max_len)
    first = jnp.minimum(block_start(starts), max_len - window)
    positions = first[:, None] + jnp.arange(window, dtype=jnp.int32)[None, :]
    is_new = (positions > 0) & (positions >= block_start(starts)[:, None]) & (positions < block_start(ends)[:, None])
    return positions, is_new


def fold(
    moments: Moments,
    keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    values: Shaped[Array, "batch max_len kv_heads head_dim"],
    starts: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    tokens: int,
    axis: str | None = None,
) -> Moments:
    """Return moments with the blocks of cached tokens that became full between two lengths of each sequence.

    Args:
        moments: of what `starts` tokens filled.
        keys: cached, after RoPE.
        values: of the same tokens.
        starts: lengths before.
        ends: lengths after; no less, and at most `tokens` more.
        tokens: the most that are new.
        axis: over which slots are split (`token_axis`): each device gives its own, and all get the same moments.
    """
    slots = keys.shape[1]
    positions, is_new = new_blocks(starts, ends, tokens, slots * devices_of(axis))
    first, window = positions[:, 0], positions.shape[1]

    def cut(rows: Array) -> Array:
        if axis is not None:
            own = positions - first_slot(slots, axis)
            held = jnp.take_along_axis(rows, jnp.clip(own, 0, slots - 1)[..., None, None], axis=1)
            is_own = ((own >= 0) & (own < slots))[..., None, None]
            return join_sums(jnp.where(is_own, held, jnp.zeros((), rows.dtype)), axis)
        if len(rows) == 1:
            return lax.dynamic_slice_in_dim(rows, first[0], window, axis=1)
        return jax.vmap(lambda own, start: lax.dynamic_slice_in_dim(own, start, window, axis=0))(rows, first)

    return add_tokens(moments, cut(keys), cut(values), is_new)


def moment_bytes(kv_heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Return the bytes that a step reads of one layer's moments of one sequence; dtype is the cache's."""
    return 4 * (1 + kv_heads * 2 * head_dim) + kv_heads * 2 * head_dim**2 * jnp.dtype(dtype).itemsize


def kept_bytes(kv_heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Return the bytes of one layer's moments of one sequence; dtype is the cache's."""
    return moment_bytes(kv_heads, head_dim, dtype) + 4 * kv_heads * 2 * head_dim**2
