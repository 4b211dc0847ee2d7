"""Sparse attention in plain XLA: gather the selected rows, then two small batched products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def sparse_attention_gather(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
) -> Float[Array, "batch q_heads head_dim"]:
    """`sparse_attention`; queries that share a selection share its rows."""
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
    scores = jnp.einsum("bhgd,bhnd->bhgn", grouped, picked_keys, preferred_element_type=jnp.float32)
    scores = jnp.where(is_real[:, :, None, :], scores * head_dim**-0.5, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhgn,bhnd->bhgd", shares, picked_values, preferred_element_type=jnp.float32)
    return out.reshape(batch, q_heads, head_dim).astype(queries.dtype)
