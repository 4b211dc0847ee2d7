"""Match scores by matrix multiplication: for many queries at once (teacher-forced evaluation, sparse prefill)."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.kernels.match_score.reference import unpack_codes


def match_score_matmul(
    codes: UInt32[Array, "batch code_heads words kv_len"], weights: Int32[Array, "batch q_len heads code_bits"]
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Compute `match_score` with bits and weights as floats; exact, since every partial sum is an integer below 2^24.

    Weights below 2^8 are exact in bfloat16 and TF32 too, so reduced-precision tensor cores change nothing.
    """
    batch, q_len, heads, code_bits = weights.shape
    grouped = weights.reshape(batch, q_len, codes.shape[1], -1, code_bits).astype(jnp.float32)
    bits = unpack_codes(codes).astype(jnp.float32)
    scores = jnp.einsum("btkgc,bkcs->btkgs", grouped, bits, preferred_element_type=jnp.float32)
    return scores.astype(jnp.int32).reshape(batch, q_len, heads, -1)
