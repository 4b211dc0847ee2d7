"""Which of a chunk's tokens are chosen, and their positions in order: a thread has a bit for each of its tokens.

Compacting is bound by instructions, so ranks are compared two at a time, and what is counted are bits.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.score_select.plan import Plan, positions_of, slots_of
from spotlight_jax.kernels.triton import Ref

BOTH_HALVES = 0x10001  # of a word: times this, a number is in both
HIGHEST_BITS = -0x7FFF8000  # of both halves


def load_ranks(words_ref: Ref, chunk: int, plan: Plan) -> list[Int32[Array, "threads words"]]:
    """Load all of this program's ranks, two in a word, by wide steps; each thread has a row of those. 0: no token.

    The mask ends at a multiple of a chunk's words, or where the row does: halved any later, Triton could not tell that
    it never parts a thread's words, and would load them one by one.
    """
    words, width = chunk // 2, min(plan.cfg.wide_step, chunk) // 2
    there = jnp.minimum(words, plan.rank_len // 2 - pl.program_id(1) * words)
    slots = (slots_of(step, width, there) for step in range(words // width))
    loaded = (plgpu.load(words_ref.at[at], mask=is_there, other=0) for at, is_there in slots)
    return [of_step.reshape(32 * plan.cfg.compact_warps, -1) for of_step in loaded]


def _reaches(words: Int32[Array, "threads words"], least: Int32[Array, ""]) -> Int32[Array, "threads"]:
    """Return a bit for each token of a thread, the lowest for the first: whether its rank is at least `least`.

    One sum raises both ranks of a word so that these reach the highest bit of their half, which ranks do not have.
    """
    count = words.shape[1]
    raised = (words + ((1 << 15) - least) * BOTH_HALVES) & HIGHEST_BITS
    shifts = jnp.broadcast_to(15 - 2 * jnp.arange(count, dtype=jnp.int32), words.shape)
    bits = jnp.sum(lax.shift_right_logical(raised, shifts), axis=1)  # lower halves: 0, 2, 4, ...; others: 16, 18, ...
    return (bits | lax.shift_right_logical(bits, 15)) & ((1 << 2 * count) - 1)


def _drop_lowest(bits: Int32[Array, "threads"], dropped: Int32[Array, "threads"], most: int) -> Int32[Array, "threads"]:
    """Return the bits without the lowest `dropped` of at most `most` that are set."""
    for count in range(most):
        bits = jnp.where(count < dropped, bits & (bits - 1), bits)
    return bits


def _choose(
    words: list[Array], tokens: int, cut: Array, own_ties: Array, dropped: Array
) -> list[tuple[Int32[Array, "threads"], Int32[Array, "threads"]]]:
    """Return which of its `tokens` of every wide step a thread chooses, a bit each, and how many of the chunk are
    chosen before those.

    Chosen are ranks above the cut, and those at it but for the first `dropped` of the chunk's `own_ties`. A count is of
    ranks above the cut and, sixteen bits higher, of those at it, below zero for those that are dropped. What threads
    count is added up for all steps together: warps wait for each other in every sum.
    """
    above = [_reaches(of_step, cut + 1) for of_step in words]
    ties = [_reaches(of_step, cut) & ~bits for of_step, bits in zip(words, above, strict=True)]
    counts = [
        lax.population_count(bits) + (lax.population_count(of_cut) << 16)
        for bits, of_cut in zip(above, ties, strict=True)
    ]
    steps = jnp.arange(1 << (len(words) - 1).bit_length(), dtype=jnp.int32)[None, :]
    of_steps = functools.reduce(jnp.add, [jnp.where(steps == step, n[:, None], 0) for step, n in enumerate(counts)])
    of_all = jnp.sum(of_steps, axis=0, keepdims=True)
    before = jnp.cumsum(of_steps, axis=0) - of_steps + jnp.cumsum(of_all, axis=1) - of_all - (dropped << 16)
    reached = [jnp.sum(jnp.where(steps == step, before, 0), axis=1) for step in range(len(words))]

    def drop_some() -> list[Array]:
        return [_drop_lowest(bits, -(of_step >> 16), tokens) for bits, of_step in zip(ties, reached, strict=True)]

    def keep_all_or_none() -> list[Array]:
        return [jnp.where(dropped == 0, bits, 0) for bits in ties]

    ties = lax.cond((dropped > 0) & (dropped < own_ties), drop_some, keep_all_or_none)
    return [
        (bits | kept, (of_step & 0xFFFF) + jnp.maximum(of_step >> 16, 0))
        for bits, kept, of_step in zip(above, ties, reached, strict=True)
    ]


def store_chosen(
    words: list[Array], cut: Array, own_ties: Array, dropped: Array, first: Array, start: Array,
    places_ref: Ref, plan: Plan,
) -> None:  # fmt: skip
    """Store the positions of a chunk's chosen tokens (`_choose`), from slot `first` on."""
    tokens = 2 * words[0].shape[1]
    token = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    for step, (bits, before) in enumerate(_choose(words, tokens, cut, own_ties, dropped)):
        is_chosen = (bits[:, None] >> token) & 1
        slots = (first + before)[:, None] + jnp.cumsum(is_chosen, axis=1) - is_chosen
        if plan.interpret:  # which writes what is masked, too
            slots = jnp.where(is_chosen != 0, slots, plan.max_budget)
        places = positions_of(start, step, slots.size).reshape(slots.shape)
        # turned, so that none are sent to other threads for the sake of slots side by side
        plgpu.store(places_ref.at[slots.T], places.T, mask=(is_chosen != 0).T)
