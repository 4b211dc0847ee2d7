"""What sparse attention means: dense attention with every row masked that was not selected."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.kernels.sparse_attention.reads import Reads


def sparse_attention_reference(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
) -> Float[Array, "batch q_heads head_dim"]:
    """`sparse_attention` through a mask over the whole cache."""
    logits, mask, wide_values = _whole(queries, keys, values, indices, is_real)
    shares = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhs,bhsd->bhd", shares, wide_values).astype(queries.dtype)


def read_selected_reference(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    mean_logits: Float[Array, "batch q_heads"],
    mean_values: Float[Array, "batch kv_heads head_dim"],
) -> Reads:
    """`read_selected` through a mask over the whole cache."""
    logits, mask, wide_values = _whole(queries, keys, values, indices, is_real)
    shares = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    counted = mask.at[..., 0].set(False)
    x = jnp.where(counted, logits - mean_logits[..., None], 0.0)
    y = wide_values - jnp.repeat(mean_values, queries.shape[1] // keys.shape[2], axis=1)[:, :, None]
    y = jnp.where(counted[..., None], y, 0.0)
    return Reads(
        out=jnp.einsum("bhs,bhsd->bhd", shares, wide_values),
        log_sum=jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1),
        highest=jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1),
        count=counted.sum(axis=-1).astype(jnp.float32),
        logits=x.sum(axis=-1),
        squares=jnp.square(x).sum(axis=-1),
        values=y.sum(axis=2),
        products=jnp.einsum("bhs,bhsd->bhd", x, y),
    )


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
