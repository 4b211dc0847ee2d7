"""Selection by counting: find the cut digit by digit, pack the mask to words, compact it with prefix sums.

No step moves a rank: each pass over the ranks only counts, and everything after the cut works on kv_len / 32 words.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, PyTree, UInt32

from spotlight_jax.bits import pack_bits
from spotlight_jax.config.hashing import WORD_BITS
from spotlight_jax.token_axis import join_sums


@flax.struct.dataclass
class Cut:
    """Chosen are the positions with rank > threshold, and those with rank == threshold from `oldest` on."""

    threshold: UInt32[Array, "*rows"]
    oldest: Int32[Array, "*rows"]
    at_least: UInt32[Array, "*rows words"]  # packed mask of rank >= threshold
    ties: UInt32[Array, "*rows words"]  # packed mask of rank == threshold; empty where no row drops a tie


def _row(values: Array, ndim: int) -> Array:
    """Return a vector with `ndim` axes, all but the last of size 1."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def _count(words: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Count the bits set in each word."""
    return lax.population_count(words).astype(jnp.int32)


def _repeat(times: int, step: Callable[[Array, PyTree], PyTree], start: PyTree) -> PyTree:
    """Take `times` steps: unrolled where a pass is a launch; in a loop on a CPU, as fast there and compiled sooner."""
    if jax.default_backend() == "cpu":
        return lax.fori_loop(0, times, step, start)
    for done in range(times):
        start = step(jnp.int32(done), start)
    return start


def _find_threshold(
    ranks: UInt32[Array, "*rows kv_len"],
    budgets: Int32[Array, "*rows"],
    rank_bits: int,
    digit_bits: int,
    axis: str | None = None,
) -> UInt32[Array, "*rows"]:
    """Return the greatest threshold, from 1 on, that at least `budgets` ranks reach (1 where fewer are above 0).

    `digit_bits` divides 32, so that no bound overflows. Ranks on all devices of an axis count.
    """
    rounds = -(-rank_bits // digit_bits)

    def find_digit(done: Array, threshold: Array) -> Array:
        shift = ((rounds - 1 - done) * digit_bits).astype(jnp.uint32)
        digit = jnp.zeros(budgets.shape, jnp.uint32)
        for candidate in range(1, 2**digit_bits):
            bound = threshold + (jnp.uint32(candidate) << shift)
            count = join_sums(jnp.sum(ranks >= bound[..., None], axis=-1, dtype=jnp.int32), axis)
            digit = digit + (count >= budgets).astype(jnp.uint32)  # counts fall as bounds rise
        return threshold + (digit << shift)

    threshold = _repeat(rounds, find_digit, jnp.zeros(budgets.shape, jnp.uint32))
    return jnp.maximum(threshold, 1)


def own_budgets(
    ranks: UInt32[Array, "*rows kv_len"],
    budgets: Int32[Array, "*rows"],
    rank_bits: int,
    digit_bits: int,
    axis: str,
) -> Int32[Array, "*rows"]:
    """Return how many of the `budgets` highest ranks on all devices of an axis are on this one: its own highest."""
    ranks = lax.optimization_barrier(ranks)
    threshold = _find_threshold(ranks, budgets, rank_bits, digit_bits, axis)[..., None]
    above, ties = (jnp.sum(is_in, axis=-1, dtype=jnp.int32) for is_in in (ranks > threshold, ranks == threshold))
    return above + own_ties(lax.all_gather(ties, axis), budgets - join_sums(above, axis), axis)


def own_ties(ties: Int32[Array, "devices *rows"], wanted: Int32[Array, "*rows"], axis: str) -> Int32[Array, "*rows"]:
    """Return how many of the `wanted` newest among the ties of all devices of an axis are this one's."""
    device, devices = lax.axis_index(axis), jnp.arange(len(ties)).reshape(-1, *[1] * wanted.ndim)
    newer = jnp.sum(jnp.where(devices > device, ties, 0), axis=0)
    return jnp.clip(wanted - newer, 0, ties[device])


def find_cut(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int, digit_bits: int
) -> Cut:
    """Return where each row's selection ends, ties going to the newest; kv_len is a multiple of 32."""
    ranks = lax.optimization_barrier(ranks)  # else XLA computes the scores anew in every pass
    threshold = _find_threshold(ranks, budgets, rank_bits, digit_bits)
    at_least = pack_bits(ranks >= threshold[..., None])
    dropped = jnp.maximum(jnp.sum(_count(at_least), axis=-1) - budgets, 0)

    def pack_ties() -> Array:
        return pack_bits(ranks == threshold[..., None])

    # most often no tie is dropped, and which ones are ties does not matter; a GPU would have to ask the host first
    if jax.default_backend() == "cpu":
        ties = lax.cond(jnp.any(dropped > 0), pack_ties, lambda: jnp.zeros_like(at_least))
    else:
        ties = pack_ties()
    tie_sums = jnp.cumsum(_count(ties), axis=-1)
    oldest = _position_of(ties, tie_sums, dropped[..., None])[..., 0]
    oldest = jnp.where(dropped > 0, oldest, 0)
    # where every tie is dropped (a budget of 0) there is no first one to keep
    oldest = jnp.where(dropped >= jnp.maximum(tie_sums[..., -1], 1), ranks.shape[-1], oldest)
    return Cut(threshold=threshold, oldest=oldest, at_least=at_least, ties=ties)


def _position_of(
    words: UInt32[Array, "*rows words"], sums: Int32[Array, "*rows words"], order: Int32[Array, "*rows n"]
) -> Int32[Array, "*rows n"]:
    """Return the position of a packed mask's set bit number `order` (from 0); `sums` are prefix sums of its counts.

    Found by counting what ends before it: blocks of words, words of its block, bits of its word.
    """
    last = words.shape[-1] - 1
    block = 1 << ((last + 1).bit_length() // 2)  # about the square root: both counts are short
    missing = -words.shape[-1] % block
    padding = [(0, 0)] * (sums.ndim - 1) + [(0, missing)]
    blocks = jnp.pad(sums, padding, constant_values=np.iinfo(np.int32).max).reshape(*sums.shape[:-1], -1, block)
    ends = blocks[..., None, :, -1]
    in_block = jnp.sum(ends <= order[..., None], axis=-1, dtype=jnp.int32)
    in_block = jnp.minimum(in_block, blocks.shape[-2] - 1)
    row = jnp.take_along_axis(blocks, in_block[..., None], axis=-2, mode="clip")
    word = in_block * block + jnp.sum(row <= order[..., None], axis=-1, dtype=jnp.int32)
    word = jnp.minimum(word, last)
    bits = jnp.take_along_axis(words, word, axis=-1, mode="clip")
    left = order - (jnp.take_along_axis(sums, word, axis=-1, mode="clip") - _count(bits))
    up_to = _row((jnp.uint32(2) << jnp.arange(WORD_BITS, dtype=jnp.uint32)) - jnp.uint32(1), bits.ndim + 1)
    place = jnp.sum(_count(bits[..., None] & up_to) <= left[..., None], axis=-1, dtype=jnp.int32)
    return word * WORD_BITS + jnp.minimum(place, WORD_BITS - 1)


def compact_mask(
    cut: Cut, budgets: Int32[Array, "*rows"], max_budget: int
) -> tuple[Int32[Array, "*rows max_budget"], Bool[Array, "*rows max_budget"]]:
    """Return positions that the cut chooses, ascending, and which slots hold one."""
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
