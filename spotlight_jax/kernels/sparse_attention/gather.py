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
    sequence = jnp.arange(batch)[:, None, None]
    kv_head = (jnp.arange(heads) // (heads // kv_heads))[None, :, None]
    picked_keys = keys.at[sequence, indices, kv_head].get(mode="promise_in_bounds")
    picked_values = values.at[sequence, indices, kv_head].get(mode="promise_in_bounds")
    grouped = queries.reshape(batch, heads, q_heads // heads, head_dim)
    scores = jnp.einsum("bhgd,bhnd->bhgn", grouped, picked_keys, preferred_element_type=jnp.float32)
    scores = jnp.where(is_real[:, :, None, :], scores * head_dim**-0.5, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhgn,bhnd->bhgd", shares, picked_values, preferred_element_type=jnp.float32)
    return out.reshape(batch, q_heads, head_dim).astype(queries.dtype)
