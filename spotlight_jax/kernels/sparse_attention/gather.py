"""Sparse attention in plain XLA: gather the selected rows, then small batched products."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.moments import BLOCK, Moments, block_start
from spotlight_jax.tail import TailParams, estimate, join, query_moments, take_off
from spotlight_jax.token_axis import first_slot, join_sums


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


def _mix(
    logits: Float[Array, "batch heads group budget"], values: Float[Array, "batch heads budget head_dim"]
) -> Float[Array, "batch heads group head_dim"]:
    """Return the softmax-weighted mean of the selected rows' values."""
    shares = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("bhgn,bhnd->bhgd", shares, values, preferred_element_type=jnp.float32)


def join_devices(
    read: Float[Array, "*rows head_dim"], log_read: Float[Array, "*rows"], axis: str
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Return what all devices of an axis read together, and the log of the sum of exponentials of all those logits.

    Args:
        read: softmax-weighted mean of the values that this device has read; anything where it has read none.
        log_read: log of the sum of exponentials of their logits; -inf where it has read none.
    """
    highest = lax.pmax(log_read, axis)
    weight = jnp.exp(log_read - highest)
    has_read = (weight > 0)[..., None]
    total, mixed = lax.psum((weight, jnp.where(has_read, read * weight[..., None], 0.0)), axis)
    return mixed / total[..., None], highest + jnp.log(total)


def sparse_attention_gather(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    axis: str | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """Compute `sparse_attention`; queries that share a selection share its rows."""
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    out = _mix(logits, picked_values)
    if axis is not None:
        out, _ = join_devices(out, jax.nn.logsumexp(logits, axis=-1), axis)
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
    axis: str | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Compute `estimated_attention`; the newest rows are gathered with the others."""
    batch, heads, _ = indices.shape
    slots, kv_heads = keys.shape[1:3]
    first = first_slot(slots, axis)
    starts, ends = block_start(ends - 1)[:, None, None] - first, (ends - first)[:, None, None]
    newest = starts + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
    newest = jnp.broadcast_to(newest, (batch, heads, BLOCK))
    is_newest = newest < ends
    if axis is not None:
        is_newest &= (newest >= 0) & (newest < slots)
        newest = jnp.clip(newest, 0, slots - 1)
    is_real = jnp.concatenate([is_real & (indices < starts), is_newest], axis=-1)
    indices = jnp.concatenate([indices, newest], axis=-1)
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    # read rows may hold anything where they are not real
    picked_values = jnp.where(is_real[..., None], picked_values, 0)
    read = _mix(logits, picked_values)

    def by_group(rows: Array) -> Array:
        """Turn rows by query heads of a selection into rows by those of a KV head."""
        return rows.reshape(batch, kv_heads, -1, *rows.shape[3:])

    whole, of_values = query_moments(moments, by_group(queries[:, :, None]))
    is_counted = jnp.broadcast_to((is_real & (indices + first > 0) & (indices < starts))[:, :, None], logits.shape)
    x = jnp.where(is_counted, logits - whole.mean.reshape(*logits.shape[:3], 1), 0.0)
    sums = join_sums([by_group(rows.sum(axis=-1)) for rows in (is_counted.astype(x.dtype), x, x * x)], axis)
    unread = take_off(whole, *sums)
    highest, log_read = by_group(logits.max(axis=-1)), by_group(jax.nn.logsumexp(logits, axis=-1))
    read = by_group(read)
    if axis is not None:
        highest, (read, log_read) = lax.pmax(highest, axis), join_devices(read, log_read, axis)
    log_mass, value = estimate(whole, unread, of_values, highest, params.grouped(kv_heads))
    out, share = join(read, log_read, value, log_mass)
    return out.reshape(queries.shape).astype(queries.dtype), share.reshape(queries.shape[:2])
