"""One kernel whose programs own whole rows: where rows fill a GPU, nothing but ranks goes through memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32, UInt32

from spotlight_jax.kernels.score_select.compacting import storer_of
from spotlight_jax.kernels.score_select.counting import BINS, MOST_STEPS, add_digits, add_up_digits, find_bin, no_digits
from spotlight_jax.kernels.score_select.plan import Plan, clear_free_slots, positions_of, walk
from spotlight_jax.kernels.score_select.scoring import ranker_of

WARPS = 16  # all that a processor holds with 128 registers a thread
THREADS = 32 * WARPS
STEP = 4096  # tokens that a program works on together, of codes up to 128 bits: eight a thread
FEWEST_ROWS = 64
LONGEST = (1 << 16) - 1  # places and ties are counted in the halves of a number


def choose_step(words: int) -> int:
    """Tokens that a program works on together: registers hold the codes of two steps."""
    return STEP >> max((words - 1).bit_length() - 2, 0)


def has_program_a_row(rows: int, kv_len: int) -> bool:
    """Whether programs own whole rows.

    A processor runs one at a time: from 64 rows on, about half of an H100's 132 or an A100's 108 processors or more are
    at work, on average over the rounds that more rows than processors take.
    """
    return rows >= FEWEST_ROWS and kv_len <= LONGEST


def _count_in_parts(steps, load, work, width: int, plan: Plan) -> tuple:
    """Histogram of what `work` counts, in parts of as many steps as fields hold."""
    parts = -(-plan.kv_len // (MOST_STEPS * width))
    length = (steps + parts - 1) // parts

    def count_part(part, counts):
        fields = walk(jnp.minimum(length, steps - part * length), load, work, no_digits(width), part * length)
        return tuple(old + new for old, new in zip(counts, add_up_digits(fields), strict=True))

    nothing = jnp.zeros((BINS // 2,), jnp.int32)
    return lax.fori_loop(0, parts, count_part, (nothing, nothing))


def _find_cut(count_ranks, counts: tuple, budget, plan: Plan) -> tuple:
    """The last chosen rank, and how many of its ties are dropped. `counts` are of the first digit."""
    cut, wanted = jnp.int32(0), budget
    for done, shift in enumerate(plan.shifts, start=1):
        found, above, up_to = find_bin(counts, wanted)
        cut, dropped, wanted = cut + ((BINS - 1 - found) << shift), up_to - wanted, wanted - above
        if done < len(plan.shifts):
            counts = count_ranks(cut, plan.shifts[done])
    return cut, dropped


def _select_kernel(bounds_ref, weights_ref, codes_ref, ranks_ref, places_ref, *, plan: Plan) -> None:
    end, budget = bounds_ref[0], bounds_ref[1]
    width = choose_step(plan.words)
    steps = (end + width - 1) // width
    rank = ranker_of(weights_ref, end, width, plan)

    def at_step(step):
        return pl.ds(step * width, width), positions_of(0, step, width) < jnp.minimum(steps * width, plan.kv_len)

    def load_words(step):
        at, is_there = at_step(step)
        return [plgpu.load(codes_ref.at[jnp.int32(word), at], mask=is_there, other=0) for word in range(plan.words)]

    def score_step(step, words, fields):
        ranks = rank(words, step * width)
        at, is_there = at_step(step)
        plgpu.store(ranks_ref.at[at], ranks.astype(ranks_ref.dtype), mask=is_there)
        return add_digits(ranks, plan.shifts[0], fields, plan.interpret)

    def load_ranks(step):
        at, is_there = at_step(step)
        return plgpu.load(ranks_ref.at[at], mask=is_there, other=0)

    def count_ranks(base, shift):
        def count_step(_, ranks, fields):
            return add_digits(ranks.astype(jnp.int32) - base, shift, fields, plan.interpret)

        return _count_in_parts(steps, load_ranks, count_step, width, plan)

    counts = _count_in_parts(steps, load_words, score_step, width, plan)
    if not plan.interpret:
        plgpu.debug_barrier()  # every thread sees what the others have stored
    cut, dropped = _find_cut(count_ranks, counts, budget, plan)
    store = storer_of(cut, dropped, 0, 0, THREADS, places_ref, plan)
    walk(steps, load_ranks, store, jnp.int32(0))
    clear_free_slots(places_ref, budget, plan, width)


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
    _, places = pl.pallas_call(
        functools.partial(_select_kernel, plan=plan),
        name="select_rows",
        grid=(plan.rows,),
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        in_specs=[pl.BlockSpec((None, 2), lambda row: (row // heads, 0)), row_of(weights.shape[1]), of_codes],
        out_specs=[row_of(plan.kv_len), row_of(plan.max_budget)],
        out_shape=[
            plan.ranks_shape,
            jax.ShapeDtypeStruct((plan.rows, plan.max_budget), jnp.int32),
        ],
    )(bounds, weights, codes)
    return places
