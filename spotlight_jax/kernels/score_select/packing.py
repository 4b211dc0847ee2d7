"""Query weights as the kernels count them: planes of bits, packed like codes (the sum: `match_score.bit_planes`)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from spotlight_jax.bits import pack_bits, unpack_bits

PLANES = 8  # in two's complement: the last one counts -2^7


def planes_of(weights: Int32[Array, "*rows code_bits"]) -> Int32[Array, "*rows planes code_bits"]:
    """Each plane's bits, the lowest first."""
    places = jnp.arange(PLANES, dtype=jnp.int32).reshape((1,) * (weights.ndim - 1) + (PLANES, 1))
    return (weights[..., None, :] >> places) & 1


def pack_weights(weights: Int32[Array, "*rows code_bits"]) -> Int32[Array, "*rows packed"]:
    """Weights from -127 to 127, packed: number p * words + w of a row has bit p of the weights 32 w to 32 w + 31."""
    words = lax.bitcast_convert_type(pack_bits(planes_of(weights)), jnp.int32)
    return words.reshape(*weights.shape[:-1], -1)


def unpack_weights(packed: Int32[Array, "*rows packed"]) -> Int32[Array, "*rows code_bits"]:
    """What `pack_weights` packed."""
    planes = lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], PLANES, -1), jnp.uint32)
    worth = jnp.asarray([1 << place for place in range(PLANES - 1)] + [-(1 << (PLANES - 1))], jnp.int32)
    worth = worth.reshape((1,) * (packed.ndim - 1) + (PLANES, 1))
    return jnp.sum(jnp.where(unpack_bits(planes), worth, 0), axis=-2, dtype=jnp.int32)
