"""What sparse attention means: dense attention with every row masked that was not selected."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def sparse_attention_reference(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
) -> Float[Array, "batch q_heads head_dim"]:
    """`sparse_attention` through a mask over the whole cache."""
    batch, q_heads, head_dim = queries.shape
    max_len, kv_heads = keys.shape[1:3]
    rows = (jnp.arange(batch)[:, None, None], jnp.arange(indices.shape[1])[None, :, None])
    mask = jnp.zeros((batch, indices.shape[1], max_len), bool).at[(*rows, indices)].max(is_real)
    mask = jnp.repeat(mask, q_heads // indices.shape[1], axis=1)
    wide_keys = jnp.repeat(keys, q_heads // kv_heads, axis=2).astype(jnp.float32)
    wide_values = jnp.repeat(values, q_heads // kv_heads, axis=2).astype(jnp.float32)
    scores = jnp.einsum("bhd,bshd->bhs", queries.astype(jnp.float32), wide_keys) / jnp.sqrt(float(head_dim))
    shares = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    used = jnp.where(mask[..., None], jnp.moveaxis(wide_values, 1, 2), 0)  # unread rows may hold anything
    return jnp.einsum("bhs,bhsd->bhd", shares, used).astype(queries.dtype)
