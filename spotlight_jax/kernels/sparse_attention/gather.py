"""Sparse attention in plain XLA: gather the selected rows, then small batched products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.moments import BLOCK, Moments, block_start
from spotlight_jax.tail import TailParams, estimate, join, query_moments, take_off


def _gather(
    queries: Array, keys: Array, values: Array, indices: Array, is_real: Array
) -> tuple[Float[Array, "batch heads group budget"], Float[Array, "batch heads budget head_dim"]]:
    """Return the float32 logits of the selected rows, -inf where a row is not real, and their values."""
    batch, q_heads, head_dim = queries.shape
    heads, kv_heads = indices.shape[1], keys.shape[2]
    # one flat row number instead of three coordinates: XLA for CPUs gathers whole rows then, twice as fast
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    kv_head = (jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads))[None, :, None]
    rows = ((sequence * keys.shape[1] + indices) * kv_heads + kv_head).reshape(-1)
    shape = (batch, heads, indices.shape[2], head_dim)
    picked_keys = jnp.take(keys.reshape(-1, head_dim), rows, axis=0, mode="clip").reshape(shape)
    picked_values = jnp.take(values.reshape(-1, head_dim), rows, axis=0, mode="clip").reshape(shape)
    grouped = queries.reshape(batch, heads, q_heads // heads, head_dim)
    logits = jnp.einsum("bhgd,bhnd->bhgn", grouped, picked_keys, preferred_element_type=jnp.float32)
    return jnp.where(is_real[:, :, None, :], logits * head_dim**-0.5, -jnp.inf), picked_values


def sparse_attention_gather(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
) -> Float[Array, "batch q_heads head_dim"]:
    """Compute `sparse_attention`; queries that share a selection share its rows."""
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    shares = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhgn,bhnd->bhgd", shares, picked_values, preferred_element_type=jnp.float32)
    return out.reshape(queries.shape).astype(queries.dtype)


def estimated_attention_gather(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    ends: Int32[Array, "batch"],
    moments: Moments,
    params: TailParams,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Compute `estimated_attention`; the newest rows are gathered with the others."""
    batch, heads, _ = indices.shape
    kv_heads = keys.shape[2]
    starts = block_start(ends - 1)[:, None, None]
    newest = starts + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
    newest = jnp.broadcast_to(newest, (batch, heads, BLOCK))
    is_real = jnp.concatenate([is_real & (indices < starts), newest < ends[:, None, None]], axis=-1)
    indices = jnp.concatenate([indices, newest], axis=-1)
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    # read rows may hold anything where they are not real
    picked_values = jnp.where(is_real[..., None], picked_values, 0)
    shares = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    read = jnp.einsum("bhgn,bhnd->bhgd", shares, picked_values, preferred_element_type=jnp.float32)

    def by_group(rows: Array) -> Array:
        """Turn rows by query heads of a selection into rows by those of a KV head."""
        return rows.reshape(batch, kv_heads, -1, *rows.shape[3:])

    whole, of_values = query_moments(moments, by_group(queries[:, :, None]))
    is_counted = jnp.broadcast_to((is_real & (indices > 0) & (indices < starts))[:, :, None], logits.shape)
    x = jnp.where(is_counted, logits - whole.mean.reshape(*logits.shape[:3], 1), 0.0)
    unread = take_off(whole, *(by_group(rows.sum(axis=-1)) for rows in (is_counted.astype(x.dtype), x, x * x)))
    highest, log_read = by_group(logits.max(axis=-1)), by_group(jax.nn.logsumexp(logits, axis=-1))
    log_mass, value = estimate(whole, unread, of_values, highest, params.grouped(kv_heads))
    out, share = join(by_group(read), log_read, value, log_mass)
    return out.reshape(queries.shape).astype(queries.dtype), share.reshape(queries.shape[:2])
