"""Two layers and a rotation for every head, as they are written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

WORD_BITS = 32


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


def hash_networks_reference(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    of_queries: Networks,
    of_keys: Networks,
    mean: Float[Array, "kv_heads head_dim"],
    scale: Float[Array, "kv_heads head_dim"],
    gain: Float[Array, "q_heads"],
) -> tuple[Float[Array, "batch q_heads code_bits"], UInt32[Array, "batch kv_heads words"]]:
    """`hash_networks` in plain XLA."""
    batch, kv_heads, head_dim = keys.shape
    grouped = queries.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim) * scale[None, :, None]
    grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True) + 1e-12)
    weights = apply_networks(of_queries, grouped.reshape(queries.shape)) * gain[None, :, None]
    bits = apply_networks(of_keys, (keys.astype(jnp.float32) - mean[None]) / scale[None]) > 0
    words = bits.reshape(batch, kv_heads, -1, WORD_BITS).astype(jnp.uint32)
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, None, None, :]
    return weights, jnp.sum(words << places, axis=-1, dtype=jnp.uint32)
