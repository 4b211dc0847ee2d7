"""Bits in words, inside kernels and outside: bit b of a row is bit b % 32 of word b // 32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped, UInt32

from spotlight_jax.config.hashing import WORD_BITS


def pack_bits(bits: Shaped[Array, "*rows bits"]) -> UInt32[Array, "*rows words"]:
    """Pack 0 and 1, or truth values, to words."""
    words = bits.reshape(*bits.shape[:-1], -1, WORD_BITS).astype(jnp.uint32)
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * (words.ndim - 1) + (WORD_BITS,))
    return jnp.sum(words << places, axis=-1, dtype=jnp.uint32)


def unpack_bits(words: UInt32[Array, "*rows words"]) -> Bool[Array, "*rows bits"]:
    """Return the bits that `pack_bits` packed."""
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * words.ndim + (WORD_BITS,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    return bits.astype(bool).reshape(*words.shape[:-1], -1)
