"""One kernel whose programs own whole rows: where rows fill a GPU, nothing but ranks goes through memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.kernels.score_select.counting import BINS, TOKENS, MOST_STEPS, add_digits, find_bin, no_digits, store_digits
from spotlight_jax.kernels.score_select.plan import Plan, clear_free_slots, positions_of, walk
from spotlight_jax.kernels.score_select.scoring import ranker_of

WARPS = 16  # all that a processor holds with 128 registers a thread
STEP = 4096  # tokens that a program works on together: eight a thread
LONGEST_ROW = MOST_STEPS * STEP
FEWEST_ROWS = 64


def has_program_a_row(rows: int, kv_len: int) -> bool:
    """Whether programs own whole rows. A processor runs one at a time: from 64 rows on, about half of an H100's 132
    or of an A100's 108 processors, or more, are at work, in the last round too where rows are more than processors."""
    return rows >= FEWEST_ROWS and kv_len <= LONGEST_ROW


def _await_program(plan: Plan) -> None:
    """Until every thread sees what the others have stored."""
    if not plan.interpret:
        plgpu.debug_barrier()


def _select_kernel(bounds_ref, weights_ref, codes_ref, ranks_ref, counts_ref, places_ref, *, plan: Plan) -> None:
    end, budget = bounds_ref[0], bounds_ref[1]
    steps = (end + STEP - 1) // STEP
    rank = ranker_of(weights_ref, end, STEP, plan)

    def at_step(step):
        return pl.ds(step * STEP, STEP), positions_of(0, step, STEP) < jnp.minimum(steps * STEP, plan.kv_len)

    def load_words(step):
        at, is_there = at_step(step)
        return [plgpu.load(codes_ref.at[jnp.int32(word), at], mask=is_there, other=0) for word in range(plan.words)]

    def load_ranks(step):
        at, is_there = at_step(step)
        return plgpu.load(ranks_ref.at[at], mask=is_there, other=0)

    def score_step(step, words, fields):
        ranks = rank(words, step * STEP)
        at, is_there = at_step(step)
        plgpu.store(ranks_ref.at[at], ranks.astype(ranks_ref.dtype), mask=is_there)
        return add_digits(ranks, plan.shifts[0], fields, plan.interpret)

    fields = walk(steps, load_words, score_step, no_digits(STEP))
    cut, wanted = jnp.int32(0), budget
    places = jnp.arange(BINS, dtype=jnp.int32)
    for done, shift in enumerate(plan.shifts, start=1):
        store_digits(fields, counts_ref, done * BINS - BINS)
        _await_program(plan)
        bins = plgpu.load(counts_ref.at[done * BINS - BINS + places])
        found, above = find_bin(bins, wanted)
        cut, wanted = cut + ((BINS - 1 - found) << shift), wanted - above
        if done < len(plan.shifts):
            next_shift = plan.shifts[done]

            def count_step(_, ranks, fields, cut=cut, next_shift=next_shift):
                return add_digits(ranks.astype(jnp.int32) - cut, next_shift, fields, plan.interpret)

            fields = walk(steps, load_ranks, count_step, no_digits(STEP))
    dropped = jnp.sum(jnp.where(places == found, bins, 0)) - wanted  # ties, the oldest ones

    def compact_step(step, ranks, before):
        ranks = ranks.astype(jnp.int32)
        steps_up = jnp.where(ranks > cut, 1, jnp.where(ranks == cut, 1 << 16, 0))
        reached = before + jnp.cumsum(steps_up)  # ranks above the cut; sixteen bits higher, ties
        kept_ties = jnp.maximum(lax.shift_right_logical(reached, 16) - dropped, 0)
        is_chosen = ranks > cut - jnp.minimum(kept_ties, 1)
        slots = jnp.where(is_chosen, (reached & 0xFFFF) + kept_ties - 1, plan.max_budget)
        slots, places = (x.reshape(-1, TOKENS).T for x in (slots, positions_of(0, step, STEP)))
        plgpu.store(places_ref.at[slots], places, mask=slots < plan.max_budget)
        return before + jnp.sum(steps_up)

    walk(steps, load_ranks, compact_step, jnp.int32(0))
    clear_free_slots(places_ref, budget, plan, STEP)


def select_by_rows(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "rows packed"],
    bounds: Int32[Array, "batch 2"],
    plan: Plan,
) -> Int32[Array, "rows max_budget"]:
    """Chosen positions of every row; bounds are a sequence's end and budget."""
    heads, group = plan.heads, plan.heads // plan.code_heads

    def row_of(*shape):
        return pl.BlockSpec((None, *shape), lambda row: (row,) + (0,) * len(shape))

    of_codes = pl.BlockSpec(
        (None, None, plan.words, plan.kv_len), lambda row: (row // heads, row % heads // group, 0, 0)
    )
    counts = len(plan.shifts) * BINS
    _, _, places = pl.pallas_call(
        functools.partial(_select_kernel, plan=plan),
        name="select_rows",
        grid=(plan.rows,),
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        in_specs=[pl.BlockSpec((None, 2), lambda row: (row // heads, 0)), row_of(weights.shape[1]), of_codes],
        out_specs=[row_of(plan.kv_len), row_of(counts), row_of(plan.max_budget)],
        out_shape=[
            plan.ranks_shape,
            jax.ShapeDtypeStruct((plan.rows, counts), jnp.int32),
            jax.ShapeDtypeStruct((plan.rows, plan.max_budget), jnp.int32),
        ],
    )(bounds, weights, codes)
    return places
