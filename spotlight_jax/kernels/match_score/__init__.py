"""Scores of cached tokens: the highest of sums of weighted bits over packed binary codes, exact integers."""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.match_score.bit_planes import match_score_bit_planes
from spotlight_jax.kernels.match_score.matmul import match_score_matmul
from spotlight_jax.kernels.match_score.reference import match_score_reference
from spotlight_jax.weights import halves

__all__ = ["MatchScoreImpl", "choose_impl", "match_score"]

MatchScoreImpl = Literal["auto", "reference", "bit_planes", "matmul"]

MATMUL_QUERIES = 16  # from here on unpacking every code once is cheaper than counting bits once per query


def choose_impl(q_len: int) -> MatchScoreImpl:
    """Return the implementation `auto` takes: bits are counted for a few queries, multiplied for many."""
    return "matmul" if q_len >= MATMUL_QUERIES else "bit_planes"


def match_score(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "batch q_len heads score_heads code_bits"],
    weight_bits: int,
    impl: MatchScoreImpl = "auto",
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Return scores [b, t, h, s]: the highest over r of the sums over c of weights[b, t, h, r, c] * bit c of
    codes[b, h // (heads // code_heads), :, s], each sum less half of its weights (`weights.halves`).

    Args:
        codes: word-major packed codes; bit c of a code is bit c % 32 of word c // 32.
        weights: the query side, some sums for each selecting head (a query head, or a KV head with its group).
        weight_bits: 1 where every weight is +1 or -1 (the score then ranks tokens as the paper's popcount(XNOR) does);
            otherwise the two's complement bits that hold every weight, 8 for int8.
        impl: `auto` chooses by q_len; a named implementation runs or raises.

    Raises: InputError where heads is no multiple of code_heads or the code widths differ.
    """
    batch, code_heads, words, kv_len = codes.shape
    _, q_len, heads, sums, code_bits = weights.shape
    if weights.shape[0] != batch or heads % code_heads or code_bits != 32 * words:
        raise InputError(
            f"codes {codes.shape} and weights {weights.shape} do not fit: batch must be equal, heads a multiple of "
            f"code_heads ({code_heads}) and code_bits 32 x words ({32 * words})"
        )
    backends: dict[str, Callable[..., Array]] = {
        "reference": match_score_reference,
        "bit_planes": functools.partial(match_score_bit_planes, weight_bits=weight_bits),
        "matmul": match_score_matmul,
    }
    run = pick_backend("match_score", backends, impl, lambda: choose_impl(q_len))
    weights = lax.optimization_barrier(weights)  # else XLA for CPUs computes them anew for every token
    found = run(codes, weights.reshape(batch, q_len, heads * sums, code_bits))
    found = found.reshape(batch, q_len, heads, sums, kv_len) - halves(weights)[..., None]
    return jnp.max(found, axis=3)
