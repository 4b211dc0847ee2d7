"""Query weights as the kernels count them: planes of bits, packed like codes.

A weight in two's complement is sum_p 2^p w_p - 2^7 w_7, so a sum of weights is that of counted bits:

    sum_b w_b k_b = sum_p 2^p popcount(k & plane_p) - 2^7 popcount(k & plane_7).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int32

WORD_BITS = 32
PLANES = 8


def pack_weights(weights: Int32[Array, "*rows code_bits"]) -> Int32[Array, "*rows packed"]:
    """Weights from -127 to 127, packed: number p * words + w of a row has bit p of the weights 32 w to 32 w + 31."""
    words = weights.reshape(*weights.shape[:-1], 1, -1, WORD_BITS)
    lead = (1,) * (weights.ndim - 1)
    planes = (words >> jnp.arange(PLANES, dtype=jnp.int32).reshape(*lead, PLANES, 1, 1)) & 1
    places = jnp.arange(WORD_BITS, dtype=jnp.int32).reshape(*lead, 1, 1, WORD_BITS)
    return jnp.sum(planes << places, axis=-1, dtype=jnp.int32).reshape(*weights.shape[:-1], -1)


def unpack_weights(packed: Int32[Array, "*rows packed"]) -> Int32[Array, "*rows code_bits"]:
    """What `pack_weights` packed."""
    planes = packed.reshape(*packed.shape[:-1], PLANES, -1, 1)
    lead = (1,) * (packed.ndim - 1)
    bits = (planes >> jnp.arange(WORD_BITS, dtype=jnp.int32).reshape(*lead, 1, 1, WORD_BITS)) & 1
    worth = jnp.asarray([1 << place for place in range(PLANES - 1)] + [-(1 << (PLANES - 1))], jnp.int32)
    weights = jnp.sum(bits * worth.reshape(*lead, PLANES, 1, 1), axis=-3, dtype=jnp.int32)
    return weights.reshape(*packed.shape[:-1], -1)
