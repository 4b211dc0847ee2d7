"""Ranks of codes: scores by four multiplications at once, with always-read tokens on top and unfilled slots at 0."""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.kernels.score_select.packing import BYTE, WORD_BITS
from spotlight_jax.kernels.score_select.plan import Plan, positions_of, run_instruction


def _byte_of(packed: Int32[Array, "*shape"], place: int) -> Int32[Array, "*shape"]:
    """The signed byte that begins at a bit."""
    return (packed << (WORD_BITS - BYTE - place)) >> (WORD_BITS - BYTE)


def _raise_bytes(packed: Int32[Array, ""], power: int) -> Int32[Array, ""]:
    """Each signed byte times 2^power, where that is a signed byte too."""
    kept = ((255 << power) & 255) * 0x01010101 - (1 << WORD_BITS)  # a negative int32
    return (packed << power) & kept


def _dot_bytes(
    bytes_: UInt32[Array, "step"], weights: Int32[Array, ""], total: Int32[Array, "step"], interpret: bool
) -> Int32[Array, "step"]:
    """total + the dot product of four unsigned bytes with four signed ones."""
    if not interpret:
        return run_instruction("dp4a.u32.s32", bytes_, jnp.broadcast_to(weights, bytes_.shape), total)
    for place in range(0, WORD_BITS, BYTE):
        byte = ((bytes_ >> place) & 255).astype(jnp.int32)
        total = total + byte * _byte_of(weights, place)
    return total


def _half_of(weights_ref, first: int, plan: Plan) -> Int32[Array, ""]:
    """Half of a sum's weights (`weights.halves`)."""
    places = jnp.arange(1 << (plan.words * BYTE - 1).bit_length(), dtype=jnp.int32)
    packed = plgpu.load(weights_ref.at[first + places], mask=places < plan.words * BYTE, other=0)
    total = jnp.zeros(places.shape, jnp.int32)
    for place in range(0, WORD_BITS, BYTE):
        total = total + _byte_of(packed, place)
    return jnp.sum(total) >> 1


def _score_words(words: list[Array], packed: list[list[Array]], plan: Plan) -> list[Array]:
    """Each sum of a code's bits, without what it is less.

    Places of a byte whose weights can be brought to one power of two are added up together. From the highest ones down,
    what is added up so far is brought to the next power, and the next bytes are added to it.
    """
    totals, power = [jnp.zeros(words[0].shape, jnp.int32)] * plan.sums, 0
    for first in reversed(range(0, BYTE, plan.span)):
        last = min(first + plan.span, BYTE) - 1
        totals = [total >> max(power - last, 0) for total in totals]
        for place in range(first, last + 1):
            mask = jnp.uint32(0x01010101 << place)
            for word, bits in enumerate(words):
                masked = bits & mask
                for one, weights in enumerate(packed):
                    raised = _raise_bytes(weights[word * BYTE + place], last - place)
                    totals[one] = _dot_bytes(masked, raised, totals[one], plan.interpret)
        power = last
    return [total >> power for total in totals]


def ranker_of(weights_ref, end: Int32[Array, ""], width: int, plan: Plan):
    """A row's function from a step's codes, and the position where the step starts, to ranks."""
    length = plan.words * BYTE
    offsets = [1 - plan.least - _half_of(weights_ref, one * length, plan) for one in range(plan.sums)]

    def rank(words: list[Array], first: Int32[Array, ""]) -> Int32[Array, "width"]:
        packed = [[weights_ref[one * length + place] for place in range(length)] for one in range(plan.sums)]
        ranks = functools.reduce(jnp.maximum, map(operator.add, _score_words(words, packed, plan), offsets))

        def force(ranks):
            positions = positions_of(first, 0, width)
            is_always_read = (positions < plan.sink_tokens) | (positions >= end - plan.recent_tokens)
            return jnp.where(positions < end, jnp.where(is_always_read, plan.always, ranks), 0)

        is_plain = (first >= plan.sink_tokens) & (first + width <= end - plan.recent_tokens)
        return lax.cond(is_plain, lambda ranks: ranks, force, ranks)

    return rank
