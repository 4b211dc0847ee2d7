"""Query weights and codes of the transform form (`transform`), and the new token in the cache, in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32, Shaped, UInt32

from spotlight_jax import transform as form
from spotlight_jax.bits import pack_bits
from spotlight_jax.cache import LayerCache, append
from spotlight_jax.transform import Transform
from spotlight_jax.weights import quantise


def hash_append_reference(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    transform: Transform,
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
) -> tuple[
    Shaped[Array, "batch q_heads head_dim"],
    Int8[Array, "batch kv_heads sums code_bits"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """`hash_append` by the functions that training and prefill hash with."""
    mean, axes, cells, decode, members, log_gain = transform
    weights = form.add_heads(members, form.bit_weights(decode, log_gain, queries[:, None]))
    weights = quantise(form.to_one_length(weights))[:, 0]
    digits = form.key_digits(mean, axes, cells, keys[:, None])
    codes = jnp.moveaxis(pack_bits(digits > 0), 1, -1)
    layer = LayerCache(cached_keys, cached_values, cached_codes)
    layer = append(layer, keys[:, None], values[:, None], codes, lengths)
    assert layer.codes is not None
    return queries, weights.astype(jnp.int8), layer.keys, layer.values, layer.codes
