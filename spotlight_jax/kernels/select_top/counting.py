"""Selection by counting: find the cut digit by digit, pack the mask to words, compact it with prefix sums.

No step moves a rank: each pass over the ranks only counts, and everything after the cut works on kv_len / 32 words.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

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


def pack_mask(mask: Bool[Array, "*rows kv_len"]) -> UInt32[Array, "*rows words"]:
    """Position s goes to bit s % 32 of word s // 32."""
    bits = mask.reshape(*mask.shape[:-1], -1, WORD_BITS).astype(jnp.uint32)
    return jnp.sum(bits << _row(jnp.arange(WORD_BITS, dtype=jnp.uint32), bits.ndim), axis=-1, dtype=jnp.uint32)


def _find_threshold(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int, digit_bits: int
) -> UInt32[Array, "*rows"]:
    """The greatest threshold, from 1 on, that at least `budgets` ranks reach (1 where fewer ranks are above 0)."""
    threshold = jnp.zeros(budgets.shape, jnp.uint32)
    for shift in reversed(range(0, rank_bits, digit_bits)):
        digit = jnp.zeros(budgets.shape, jnp.uint32)
        for candidate in range(1, 2 ** min(digit_bits, WORD_BITS - shift)):
            bound = threshold + jnp.uint32(candidate << shift)
            count = jnp.sum(ranks >= bound[..., None], axis=-1, dtype=jnp.int32)
            digit = digit + (count >= budgets).astype(jnp.uint32)  # counts fall as bounds rise
        threshold = threshold + (digit << shift)
    return jnp.maximum(threshold, 1)


def find_cut(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int, digit_bits: int
) -> Cut:
    """Where each row's selection ends, ties going to the newest; kv_len is a multiple of 32."""
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
    word = jnp.zeros_like(order)  # how many words end at or before the bit
    for step in reversed(range(max(last, 1).bit_length())):
        ahead = word + (1 << step)
        reaches = jnp.take_along_axis(sums, jnp.minimum(ahead, last + 1) - 1, axis=-1, mode="clip")
        word = jnp.where((ahead <= last) & (reaches <= order), ahead, word)
    bits = jnp.take_along_axis(words, word, axis=-1, mode="clip")
    left = order - (jnp.take_along_axis(sums, word, axis=-1, mode="clip") - _count(bits))
    place = jnp.zeros_like(order)
    for width in (16, 8, 4, 2, 1):
        below = _count((bits >> place.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1))
        is_above = left >= below
        left = jnp.where(is_above, left - below, left)
        place = jnp.where(is_above, place + width, place)
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
