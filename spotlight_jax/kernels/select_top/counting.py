"""Selection by counting: find the cut digit by digit, pack the mask to words, compact it with prefix sums.

No step moves a rank: each pass over the ranks only counts, and everything after the cut works on kv_len / 32 words.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, PyTree, UInt32

WORD_BITS = 32


@flax.struct.dataclass
class Cut:
    """Chosen are the positions with rank > threshold, and those with rank == threshold from `oldest` on."""

    threshold: UInt32[Array, "*rows"]
    oldest: Int32[Array, "*rows"]
    dropped: Int32[Array, "*rows"]  # ties before `oldest`
    at_least: UInt32[Array, "*rows words"]  # packed mask of rank >= threshold
    ties: UInt32[Array, "*rows words"]  # packed mask of rank == threshold


def _row(values: Array, ndim: int) -> Array:
    """A vector with `ndim` axes, all but the last of size 1."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def _count(words: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Bits set in each word."""
    return lax.population_count(words).astype(jnp.int32)


def _repeat(times: int, step: Callable, start: PyTree) -> PyTree:
    """`times` steps: unrolled where a pass is a launch; a loop on a CPU, where it runs the same and compiles faster."""
    if jax.default_backend() == "cpu":
        return lax.fori_loop(0, times, step, start)
    for done in range(times):
        start = step(jnp.int32(done), start)
    return start


def pack_mask(mask: Bool[Array, "*rows kv_len"]) -> UInt32[Array, "*rows words"]:
    """Position s goes to bit s % 32 of word s // 32."""
    bits = mask.reshape(*mask.shape[:-1], -1, WORD_BITS).astype(jnp.uint32)
    return jnp.sum(bits << _row(jnp.arange(WORD_BITS, dtype=jnp.uint32), bits.ndim), axis=-1, dtype=jnp.uint32)


def _find_threshold(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int, digit_bits: int
) -> UInt32[Array, "*rows"]:
    """The greatest threshold, from 1 on, that at least `budgets` ranks reach (1 where fewer ranks are above 0).

    `digit_bits` divides 32, so that no bound overflows.
    """
    rounds = -(-rank_bits // digit_bits)

    def find_digit(done, threshold):
        shift = ((rounds - 1 - done) * digit_bits).astype(jnp.uint32)
        digit = jnp.zeros(budgets.shape, jnp.uint32)
        for candidate in range(1, 2**digit_bits):
            bound = threshold + (jnp.uint32(candidate) << shift)
            count = jnp.sum(ranks >= bound[..., None], axis=-1, dtype=jnp.int32)
            digit = digit + (count >= budgets).astype(jnp.uint32)  # counts fall as bounds rise
        return threshold + (digit << shift)

    threshold = _repeat(rounds, find_digit, jnp.zeros(budgets.shape, jnp.uint32))
    return jnp.maximum(threshold, 1)


def find_cut(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int, digit_bits: int
) -> Cut:
    """Where each row's selection ends, ties going to the newest; kv_len is a multiple of 32."""
    ranks = lax.optimization_barrier(ranks)  # else XLA computes the scores anew in every pass
    threshold = _find_threshold(ranks, budgets, rank_bits, digit_bits)
    at_least = pack_mask(ranks >= threshold[..., None])
    ties = pack_mask(ranks == threshold[..., None])
    dropped = jnp.maximum(jnp.sum(_count(at_least), axis=-1) - budgets, 0)
    tie_sums = jnp.cumsum(_count(ties), axis=-1)
    oldest = _position_of(ties, tie_sums, dropped[..., None])[..., 0]
    # where every tie is dropped (a budget of 0) there is no first one to keep
    oldest = jnp.where(dropped < tie_sums[..., -1], oldest, ranks.shape[-1])
    return Cut(threshold=threshold, oldest=oldest, dropped=dropped, at_least=at_least, ties=ties)


def _position_of(
    words: UInt32[Array, "*rows words"], sums: Int32[Array, "*rows words"], order: Int32[Array, "*rows n"]
) -> Int32[Array, "*rows n"]:
    """Position of the set bit number `order` (from 0) of a packed mask; `sums` are inclusive prefix sums of its counts.

    Two binary searches: for the word in the prefix sums, for the bit in the word.
    """
    last = words.shape[-1] - 1
    word_steps = max(last, 1).bit_length()

    def find_word(done, word):  # word: how many words end at or before the bit
        ahead = word + (1 << (word_steps - 1 - done))
        reaches = jnp.take_along_axis(sums, jnp.minimum(ahead, last + 1) - 1, axis=-1, mode="clip")
        return jnp.where((ahead <= last) & (reaches <= order), ahead, word)

    if order.shape[-1] == 1:  # one bit a row: comparing it with every prefix sum is less work than a search
        word = jnp.minimum(jnp.sum(sums <= order, axis=-1, keepdims=True, dtype=jnp.int32), last)
    else:
        word = _repeat(word_steps, find_word, jnp.zeros_like(order))
    bits = jnp.take_along_axis(words, word, axis=-1, mode="clip")
    ahead_of_word = jnp.take_along_axis(sums, word, axis=-1, mode="clip") - _count(bits)

    def find_place(done, carry):  # left: set bits of the word still to pass
        place, left = carry
        width = jnp.int32(16) >> done
        below = _count((bits >> place.astype(jnp.uint32)) & ((jnp.uint32(1) << width.astype(jnp.uint32)) - 1))
        is_above = left >= below
        return jnp.where(is_above, place + width, place), jnp.where(is_above, left - below, left)

    place, _ = _repeat(5, find_place, (jnp.zeros_like(order), order - ahead_of_word))
    return word * WORD_BITS + place


def compact_mask(
    cut: Cut, budgets: Int32[Array, "*rows"], max_budget: int
) -> tuple[Int32[Array, "*rows max_budget"], Bool[Array, "*rows max_budget"]]:
    """Positions that the cut chooses, ascending, and which slots hold one."""
    starts = _row(jnp.arange(cut.ties.shape[-1], dtype=jnp.int32) * WORD_BITS, cut.ties.ndim)
    too_old = jnp.clip(cut.oldest[..., None] - starts, 0, WORD_BITS)  # positions of each word before `oldest`
    all_bits = jnp.uint32(0xFFFFFFFF)
    # a shift by the word's whole width is undefined, so it is written out
    is_new = jnp.where(too_old == WORD_BITS, jnp.uint32(0), all_bits << jnp.minimum(too_old, 31).astype(jnp.uint32))
    words = cut.at_least & (~cut.ties | is_new)
    sums = jnp.cumsum(_count(words), axis=-1)
    order = _row(jnp.arange(max_budget, dtype=jnp.int32), words.ndim)
    is_real = order < jnp.minimum(budgets, sums[..., -1])[..., None]
    positions = _position_of(words, sums, jnp.broadcast_to(order, is_real.shape))
    return jnp.where(is_real, positions, 0), is_real
