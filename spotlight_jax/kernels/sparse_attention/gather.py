"""Sparse attention in plain XLA: gather the selected rows, then small batched products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.kernels.sparse_attention.reads import Reads


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
    """`sparse_attention`; queries that share a selection share its rows."""
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    shares = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhgn,bhnd->bhgd", shares, picked_values, preferred_element_type=jnp.float32)
    return out.reshape(queries.shape).astype(queries.dtype)


def read_selected_gather(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    mean_logits: Float[Array, "batch q_heads"],
    mean_values: Float[Array, "batch kv_heads head_dim"],
) -> Reads:
    """`read_selected`; the products with values are one."""
    batch, heads = indices.shape[:2]
    logits, picked_values = _gather(queries, keys, values, indices, is_real)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    shares = jnp.exp(logits - log_sum[..., None])
    is_counted = (is_real & (indices > 0))[:, :, None, :]
    x = jnp.where(is_counted, logits - mean_logits.reshape(batch, heads, -1, 1), 0.0)
    ones = jnp.broadcast_to(is_counted, x.shape).astype(jnp.float32)
    means = jnp.repeat(mean_values, heads // mean_values.shape[1], axis=1)[:, :, None]
    y = jnp.where(is_real[..., None], picked_values.astype(jnp.float32), 0.0) - means
    rows = jnp.concatenate([shares, ones[:, :, :1], x], axis=2)
    mixed = jnp.einsum("bhgn,bhnd->bhgd", rows, y)
    group = logits.shape[2]
    flat, vector = (batch, queries.shape[1]), queries.shape
    return Reads(
        out=(mixed[:, :, :group] + means).reshape(vector),
        log_sum=log_sum.reshape(flat),
        highest=logits.max(axis=-1).reshape(flat),
        count=ones.sum(axis=-1).reshape(flat),
        logits=x.sum(axis=-1).reshape(flat),
        squares=jnp.square(x).sum(axis=-1).reshape(flat),
        values=jnp.broadcast_to(mixed[:, :, group : group + 1], (batch, heads, group, vector[2])).reshape(vector),
        products=mixed[:, :, group + 1 :].reshape(vector),
    )
