"""What a match score means: unpack the bits, multiply, add."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.config.hashing import WORD_BITS


def unpack_codes(codes: UInt32[Array, "batch code_heads words kv_len"]) -> Int32[Array, "b h code_bits kv_len"]:
    """Return the bits of word-major codes, as 0 or 1."""
    batch, code_heads, words, kv_len = codes.shape
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, None, None, :, None]
    bits = (codes[:, :, :, None, :] >> places) & jnp.uint32(1)
    return bits.astype(jnp.int32).reshape(batch, code_heads, words * WORD_BITS, kv_len)


def match_score_reference(
    codes: UInt32[Array, "batch code_heads words kv_len"], weights: Int32[Array, "batch q_len heads code_bits"]
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Sum of the weights whose bit is set."""
    bits = jnp.repeat(unpack_codes(codes), weights.shape[2] // codes.shape[1], axis=1)
    return jnp.einsum("bthc,bhcs->bths", weights, bits)
