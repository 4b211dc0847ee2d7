"""What sparse attention means: dense attention with every row masked that was not selected."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.moments import Moments, with_newest
from spotlight_jax.tail import TailParams, estimate, join, split_by_logits


def sparse_attention_reference(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
) -> Float[Array, "batch q_heads head_dim"]:
    """Compute `sparse_attention` through a mask over the whole cache."""
    logits, mask, wide_values = _whole(queries, keys, values, indices, is_real)
    shares = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhs,bhsd->bhd", shares, wide_values).astype(queries.dtype)


def estimated_attention_reference(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    ends: Int32[Array, "batch"],
    moments: Moments,
    params: TailParams,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Compute `estimated_attention` from all logits; the given moments are not looked at."""
    del moments
    batch, q_heads, _ = queries.shape
    rows = (batch, keys.shape[2], q_heads // keys.shape[2], 1, -1)
    logits, mask, _ = _whole(queries, keys, values, indices, is_real)
    positions = ends[:, None] - 1
    mask = with_newest(mask[:, None], positions)[:, 0]
    is_cached = (jnp.arange(keys.shape[1], dtype=jnp.int32)[None] < ends[:, None])[:, :, None, None]
    split = split_by_logits(
        logits.reshape(rows), mask.reshape(rows), jnp.where(is_cached, values.astype(jnp.float32), 0), positions
    )
    corrections = jax.tree.map(lambda leaf: leaf[:, None], params.grouped(keys.shape[2]))
    log_mass, value = estimate(split.whole, split.unread, split.values, split.highest, corrections)
    out, share = join(split.read, split.log_read, value, log_mass)
    return out.reshape(queries.shape).astype(queries.dtype), share.reshape(batch, q_heads)


def _whole(
    queries: Array, keys: Array, values: Array, indices: Array, is_real: Array
) -> tuple[
    Float[Array, "batch q_heads max_len"],
    Bool[Array, "batch q_heads max_len"],
    Float[Array, "batch q_heads max_len head_dim"],
]:
    """Return all logits, which rows are read, and the values of those (0 elsewhere: unread rows may hold anything)."""
    batch, q_heads, head_dim = queries.shape
    max_len, kv_heads = keys.shape[1:3]
    rows = (jnp.arange(batch)[:, None, None], jnp.arange(indices.shape[1])[None, :, None])
    mask = jnp.zeros((batch, indices.shape[1], max_len), bool).at[(*rows, indices)].max(is_real)
    mask = jnp.repeat(mask, q_heads // indices.shape[1], axis=1)
    wide_keys = jnp.repeat(keys, q_heads // kv_heads, axis=2).astype(jnp.float32)
    wide_values = jnp.repeat(values, q_heads // kv_heads, axis=2).astype(jnp.float32)
    scores = jnp.einsum("bhd,bshd->bhs", queries.astype(jnp.float32), wide_keys) / jnp.sqrt(float(head_dim))
    return scores, mask, jnp.where(mask[..., None], jnp.moveaxis(wide_values, 1, 2), 0)
