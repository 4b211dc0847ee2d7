"""Match scores by counting bits: the weights are cut into bit planes packed like the codes.

With weights in two's complement, w = sum_p 2^p w_p - 2^(P-1) w_(P-1), so

    sum_b w_b k_b = sum_p 2^p popcount(k & plane_p) - 2^(P-1) popcount(k & plane_(P-1)):

P and-popcounts a word, whatever the size of the group. Weights of +-1 need a single one, because with the plane q of
positive weights sum_b w_b k_b = popcount(q & k) - popcount(~q & k) = popcount(q) - popcount(q ^ k).
"""

import functools
import operator
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.bits import pack_bits


def _count(words: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Count the bits set in each word."""
    return lax.population_count(words).astype(jnp.int32)


def match_score_bit_planes(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "batch q_len heads code_bits"],
    weight_bits: int,
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Compute `match_score` without unpacking a code: one fused pass over the packed words."""
    batch, q_len, heads, _ = weights.shape
    code_heads, words = codes.shape[1:3]
    grouped = weights.reshape(batch, q_len, code_heads, heads // code_heads, -1)

    def matches(plane: Array, combine: Callable[[Array, Array], Array]) -> Array:
        counts = [_count(combine(codes[:, None, :, None, word, :], plane[..., word, None])) for word in range(words)]
        return functools.reduce(operator.add, counts)  # one by one: words are few, and this is one elementwise loop

    if weight_bits == 1:
        plane = pack_bits(grouped > 0)
        scores = jnp.sum(_count(plane), axis=-1)[..., None] - matches(plane, jnp.bitwise_xor)
    else:
        planes = [pack_bits((grouped >> place) & 1) for place in range(weight_bits)]
        counts = [matches(plane, jnp.bitwise_and) << place for place, plane in enumerate(planes)]
        scores = functools.reduce(operator.add, [*counts[:-1], -counts[-1]])
    return scores.reshape(batch, q_len, heads, -1)
