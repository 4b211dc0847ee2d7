"""Two layers and a rotation for every head, integer weights of the queries, bits of the keys: as they are written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from spotlight_jax.kernels.score_select.packing import WORD_BITS, pack_weights


class Networks(NamedTuple):
    """One layer's networks of some heads: silu(x W + b) V + c + x R."""

    hidden_kernel: Float[Array, "heads head_dim hidden"]
    hidden_bias: Float[Array, "heads hidden"]
    out_kernel: Float[Array, "heads hidden code_bits"]
    out_bias: Float[Array, "heads code_bits"]
    rotation: Float[Array, "heads head_dim code_bits"]


def apply_networks(
    networks: Networks, x: Float[Array, "batch heads head_dim"]
) -> Float[Array, "batch heads code_bits"]:
    """Each head's network of its own row."""
    hidden = jax.nn.silu(jnp.einsum("bhd,hdi->bhi", x, networks.hidden_kernel) + networks.hidden_bias[None])
    out = jnp.einsum("bhi,hic->bhc", hidden, networks.out_kernel) + networks.out_bias[None]
    return out + jnp.einsum("bhd,hdc->bhc", x, networks.rotation)


def hash_append_reference(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    of_queries: Networks,
    of_keys: Networks,
    mean: Float[Array, "kv_heads head_dim"],
    scale: Float[Array, "kv_heads head_dim"],
    log_gain: Float[Array, "q_heads"],
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
    limit: int,
    per_kv_head: bool,
) -> tuple[
    Int32[Array, "batch heads packed"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """`hash_append` in plain XLA."""
    batch, kv_heads, head_dim = keys.shape
    grouped = queries.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim) * scale[None, :, None]
    grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True) + 1e-12)
    outputs = apply_networks(of_queries, grouped.reshape(queries.shape)) * jnp.exp(log_gain)[None, :, None]
    if per_kv_head:
        outputs = jnp.sum(outputs.reshape(batch, kv_heads, -1, outputs.shape[-1]), axis=2)
    largest = jnp.max(jnp.abs(outputs), axis=-1, keepdims=True)
    weights = jnp.round(outputs * (limit / jnp.maximum(largest, 1e-30))).astype(jnp.int32)

    bits = apply_networks(of_keys, (keys.astype(jnp.float32) - mean[None]) / scale[None]) > 0
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, None, None, :]
    words = bits.reshape(batch, kv_heads, -1, WORD_BITS).astype(jnp.uint32) << places
    codes = jnp.sum(words, axis=-1, dtype=jnp.uint32)

    rows = jnp.arange(batch, dtype=jnp.int32)
    at = jnp.minimum(lengths, cached_keys.shape[1] - 1)
    return (
        pack_weights(weights),
        cached_keys.at[rows, at].set(keys.astype(cached_keys.dtype)),
        cached_values.at[rows, at].set(values.astype(cached_values.dtype)),
        cached_codes.at[rows, :, :, at].set(codes),
    )
