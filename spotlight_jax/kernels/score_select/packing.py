"""Query weights as `dp4a` multiplies them: four signed bytes to a number."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

WORD_BITS = 32
BYTE = 8


def pack_weights(weights: Int32[Array, "*rows code_bits"]) -> Int32[Array, "*rows packed"]:
    """Weights from -127 to 127, packed: number 8 w + j of a row has those of bits 32 w + j, + 8, + 16 and + 24.

    Bits of a word taken eight apart are four bytes of 0 or 2^j, which meet these four in one instruction.
    """
    bytes_ = (weights & 255).reshape(*weights.shape[:-1], -1, WORD_BITS // BYTE, BYTE)
    packed = bytes_[..., 0, :]
    for place in range(1, WORD_BITS // BYTE):
        packed = packed | (bytes_[..., place, :] << (BYTE * place))
    return packed.reshape(*weights.shape[:-1], -1)


def unpack_weights(packed: Int32[Array, "*rows packed"]) -> Int32[Array, "*rows code_bits"]:
    """What `pack_weights` packed."""
    numbers = packed.reshape(*packed.shape[:-1], -1, 1, BYTE)
    places = BYTE * jnp.arange(WORD_BITS // BYTE, dtype=jnp.int32)[:, None]
    signed = (numbers << (WORD_BITS - BYTE - places).reshape((1,) * (numbers.ndim - 2) + (-1, 1))) >> (WORD_BITS - BYTE)
    return signed.reshape(*packed.shape[:-1], -1)
