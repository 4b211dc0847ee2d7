"""Scores, the cut and its compaction in three kernels: codes are read once, ranks are counted where they lie.

A row is one selecting head of one sequence. Programs own chunks of rows, so that a GPU is full however few rows there
are:

score     codes -> ranks, and a histogram of the ranks' first digit
refine    adds up the histograms of all chunks: one digit of the cut; a histogram of the next digit below it
compact   the last digit; a chunk knows from all histograms where its choice goes, ties to the newest chunks first

Tensor cores count the bits that codes share with the planes of the weights, exactly (`scoring`). A histogram has 32
bins: a thread counts in fields of four bits, eight to a number, and the program adds them up at the end (`counting`).
Ranks are stored to stay in the L2 cache, and codes make room first: what a step computes on the way shares the memory
of the ranks, and all that is read waits where it goes to memory and back.
Counts are whole numbers and every choice has one place, so a run gives the same result bit for bit every time. Needs
compute capability 8.0, as binary matrix products do.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Int32, UInt32

from spotlight_jax.kernels.score_select.counting import BINS, MOST_STEPS, add_digits, add_up_digits, find_bin, no_digits
from spotlight_jax.kernels.score_select.plan import Plan, clear_free_slots, positions_of, walk
from spotlight_jax.kernels.score_select.scoring import ranker_of
from spotlight_jax.weights import WeightBounds

ABOVE = BINS  # place of the count of ranks above all bins
COUNTS = 64  # places of a chunk: bins, and the ranks above; a power of two

PROGRAMS = 384  # at most, where chunks are long enough: three for each processor of an H100, all at work at once
SCORE_WARPS = 4  # few, each with many codes on their way: what scoring waits for is memory
REFINE_WARPS = 4  # refining is faster with fewer; compacting is not
COMPACT_WARPS = 8
STEP = 1024  # tokens that a program scores together
WIDE_STEP = 2048  # ranks that it counts or compacts together; a chunk is one step or some wide ones
LONGEST_CHUNK = MOST_STEPS * STEP


def choose_chunk(rows: int, kv_len: int) -> int:
    """Tokens of a program: few enough that a GPU is full, many enough that all programs run at once."""
    chunk = WIDE_STEP * -(-rows * kv_len // (PROGRAMS * WIDE_STEP))
    return STEP if rows * kv_len <= PROGRAMS * STEP else min(chunk, LONGEST_CHUNK)


def _in_filled_chunk(is_filled, counts_ref, count) -> None:
    """Count in a chunk that holds tokens; nothing is counted in others."""

    def clear():
        counts_ref[...] = jnp.zeros((COUNTS,), jnp.int32)

    pl.when(is_filled)(count)
    pl.when(jnp.logical_not(is_filled))(clear)


def _store_counts(fields: tuple, counts_ref) -> None:
    """The program's histogram, the highest bin first."""
    dealt = add_up_digits(fields)
    for turn, counts in enumerate(dealt):
        plgpu.store(counts_ref.at[len(dealt) * jnp.arange(counts.size, dtype=jnp.int32) + turn], counts)


def _slots_of(step, width: int, there: Int32[Array, ""]) -> tuple:
    """A step's slots in a program's chunk, and whether they are among the `there` that the cache has of it.

    None lie past the chunk: what is asked for ahead of its last step is not read.
    """
    return pl.ds(step * width, width), positions_of(0, step, width) < there


def _score_kernel(bounds_ref, weights_ref, codes_ref, ranks_ref, counts_ref, *, plan: Plan, chunk: int) -> None:
    start, end = pl.program_id(1) * chunk, bounds_ref[0]
    rank, there = ranker_of(weights_ref, end, STEP, plan), jnp.minimum(chunk, plan.kv_len - start)

    def load_words(step):
        at, is_there = _slots_of(step, STEP, there)
        words = [codes_ref.at[jnp.int32(word), at] for word in range(plan.words)]
        return [plgpu.load(word, mask=is_there, other=0, eviction_policy="evict_first") for word in words]

    def score_step(step, words, fields):
        ranks = rank(words, start + step * STEP)
        at, is_there = _slots_of(step, STEP, there)
        plgpu.store(ranks_ref.at[at], ranks.astype(ranks_ref.dtype), mask=is_there, eviction_policy="evict_last")
        return add_digits(ranks, plan.shifts[0], fields, plan.interpret)

    def count():
        _store_counts(walk(chunk // STEP, load_words, score_step, no_digits(STEP)), counts_ref)
        counts_ref[ABOVE] = jnp.int32(0)

    _in_filled_chunk(start < end, counts_ref, count)


def _load_ranks(ranks_ref, chunk: int, plan: Plan) -> list[Array]:
    """All of this program's ranks, in wide steps; 0 behind those that there are."""
    width, there = min(WIDE_STEP, chunk), jnp.minimum(chunk, plan.kv_len - pl.program_id(1) * chunk)
    slots = (_slots_of(step, width, there) for step in range(chunk // width))
    return [plgpu.load(ranks_ref.at[at], mask=is_there, other=0) for at, is_there in slots]


def _load_bins(counts_ref) -> Int32[Array, "bins lanes"]:
    """Histograms of a row's chunks, the highest bin first; lanes are a power of two."""
    chunks = counts_ref.shape[1]
    lanes = 1 << (chunks - 1).bit_length()
    of_chunk, places = jnp.arange(lanes, dtype=jnp.int32), jnp.arange(BINS, dtype=jnp.int32)
    is_there = jnp.broadcast_to((of_chunk < chunks)[None, :], (BINS, lanes))
    return plgpu.load(counts_ref.at[places[:, None], of_chunk[None, :]], mask=is_there, other=0)


def _refine_kernel(
    bounds_ref, cut_ref, before_ref, ranks_ref, new_cut_ref, counts_ref, *, plan: Plan, chunk: int, done: int
):
    own = pl.program_id(1)
    ranks = _load_ranks(ranks_ref, chunk, plan)  # these and all else are on their way while the cut is found
    end, budget, known, above_known = bounds_ref[0], bounds_ref[1], cut_ref[0], cut_ref[1]
    places = jnp.arange(BINS, dtype=jnp.int32)
    own_bins, own_above = plgpu.load(before_ref.at[places, own]), before_ref[ABOVE, own]
    found, above = find_bin(jnp.sum(_load_bins(before_ref), axis=1), budget - above_known)
    base = known + ((BINS - 1 - found) << plan.shifts[done - 1])
    new_cut_ref[0] = base
    new_cut_ref[1] = above_known + above

    def count():
        fields = no_digits(ranks[0].size)
        for of_step in ranks:
            fields = add_digits(of_step.astype(jnp.int32) - base, plan.shifts[done], fields, plan.interpret)
        _store_counts(fields, counts_ref)
        counts_ref[ABOVE] = own_above + jnp.sum(jnp.where(places < found, own_bins, 0))

    _in_filled_chunk(own * chunk < end, counts_ref, count)


def _store_chosen(ranks: list[Array], cut, dropped, first, start, places_ref, plan: Plan) -> None:
    """Positions of a chunk's chosen tokens, from slot `first` on, wide step by wide step.

    Chosen are ranks above the cut, and those at it but for the first `dropped`. What is carried counts ranks above the
    cut and, sixteen bits higher, ties.
    """
    before = jnp.int32(0)
    for step, of_step in enumerate(ranks):
        of_step = of_step.astype(jnp.int32)
        counted = jnp.where(of_step > cut, 1, jnp.where(of_step == cut, 1 << 16, 0))
        reached = before + jnp.cumsum(counted)
        kept_ties = jnp.maximum(lax.shift_right_logical(reached, 16) - dropped, 0)
        is_chosen = of_step + jnp.minimum(kept_ties, 1) > cut
        slots = jnp.where(is_chosen, first + (reached & 0xFFFF) + kept_ties - 1, plan.max_budget)
        call = slots, positions_of(start, step, of_step.size), is_chosen
        # a column holds the tokens of a thread, so that none are sent to others for the sake of slots side by side
        slots, places, is_chosen = (of_tokens.reshape(32 * COMPACT_WARPS, -1).T for of_tokens in call)
        plgpu.store(places_ref.at[slots], places, mask=is_chosen)
        before = before + jnp.sum(counted)


def _compact_kernel(bounds_ref, cut_ref, before_ref, ranks_ref, places_ref, *, plan: Plan, chunk: int) -> None:
    ranks = _load_ranks(ranks_ref, chunk, plan)  # these and all else are on their way while the cut is found
    budget, known, above_known = bounds_ref[1], cut_ref[0], cut_ref[1]
    bins = _load_bins(before_ref)
    chunks = jnp.arange(bins.shape[1], dtype=jnp.int32)
    above_before = plgpu.load(before_ref.at[ABOVE, chunks], mask=chunks < before_ref.shape[1], other=0)
    found, above_cut = find_bin(jnp.sum(bins, axis=1), budget - above_known)
    cut = known + BINS - 1 - found
    rows = jnp.arange(BINS, dtype=jnp.int32)[:, None]
    both = jnp.sum(jnp.where(rows < found, bins, 0) + jnp.where(rows == found, bins << 16, 0), axis=0)
    ties = lax.shift_right_logical(both, 16)  # of each chunk
    above = above_before + (both & 0xFFFF)
    newer_ties = jnp.sum(ties) - jnp.cumsum(ties)
    taken = jnp.clip(budget - above_known - above_cut - newer_ties, 0, ties)
    own, start = pl.program_id(1), pl.program_id(1) * chunk
    first = jnp.sum(jnp.where(chunks < own, above + taken, 0))
    counts = jnp.sum(jnp.where(chunks == own, ((above + taken) << 16) + ties - taken, 0))
    chosen, dropped = lax.shift_right_logical(counts, 16), counts & 0xFFFF

    @pl.when(chosen > 0)
    def compact():
        _store_chosen(ranks, cut, dropped, first, start, places_ref, plan)

    @pl.when(own == before_ref.shape[1] - 1)
    def clear():
        clear_free_slots(places_ref, budget, plan, WIDE_STEP)


def _select(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "rows packed"],
    bounds: Int32[Array, "batch 2"],
    plan: Plan,
) -> Int32[Array, "rows max_budget"]:
    """Chosen positions of every row; bounds are a sequence's end and budget."""
    rows, heads, group = plan.rows, plan.heads, plan.heads // plan.code_heads
    chunk = choose_chunk(rows, plan.kv_len)
    chunks = -(-plan.kv_len // chunk)

    def row_and_chunk(*shape):
        return pl.BlockSpec(shape, lambda row, chunk: (row,) + (0,) * (len(shape) - 2) + (chunk,))

    def row_of(*shape):
        return pl.BlockSpec((None, *shape), lambda row, chunk: (row,) + (0,) * len(shape))

    of_codes = pl.BlockSpec(
        (None, None, plan.words, chunk), lambda row, chunk: (row // heads, row % heads // group, 0, chunk)
    )
    of_bounds = pl.BlockSpec((None, 2), lambda row, chunk: (row // heads, 0))
    of_ranks, of_counts = row_and_chunk(None, chunk), row_of(COUNTS, chunks)
    own_counts = row_and_chunk(None, COUNTS, None)
    counts_shape = jax.ShapeDtypeStruct((rows, COUNTS, chunks), jnp.int32)

    def call(kernel, name, warps, **specs):
        kernel = functools.partial(kernel, plan=plan, chunk=chunk)
        params = plgpu.CompilerParams(num_warps=warps, num_stages=1)
        return pl.pallas_call(
            kernel, name=name, grid=(rows, chunks), interpret=plan.interpret, compiler_params=params, **specs
        )

    ranks, counts = call(
        _score_kernel, "score_ranks", SCORE_WARPS, in_specs=[of_bounds, row_of(weights.shape[1]), of_codes],
        out_specs=[of_ranks, own_counts], out_shape=[plan.ranks_shape, counts_shape],
    )(bounds, weights, codes)  # fmt: skip
    cut = jnp.zeros((rows, 2), jnp.int32)  # the cut's digits so far, and how many ranks lie above them
    before = [of_bounds, row_of(2), of_counts, of_ranks]
    for done in range(1, len(plan.shifts)):
        cut, counts = call(
            functools.partial(_refine_kernel, done=done), "refine_cut", REFINE_WARPS, in_specs=before,
            out_specs=[row_of(2), own_counts], out_shape=[jax.ShapeDtypeStruct(cut.shape, jnp.int32), counts_shape],
        )(bounds, cut, counts, ranks)  # fmt: skip
    return call(
        _compact_kernel, "compact_chosen", COMPACT_WARPS, in_specs=before, out_specs=row_of(plan.max_budget),
        out_shape=jax.ShapeDtypeStruct((rows, plan.max_budget), jnp.int32),
    )(bounds, cut, counts, ranks)  # fmt: skip


def score_select_pallas_triton(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "batch heads sums packed"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    bounds: WeightBounds,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    interpret: bool = False,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """As the reference."""
    batch, code_heads, words, kv_len = codes.shape
    heads, sums = weights.shape[1:3]
    least, greatest = bounds.score_range
    plan = Plan(
        batch=batch, heads=heads, code_heads=code_heads, words=words, kv_len=kv_len,
        sums=sums, least=least, rank_bits=(greatest - least + 2).bit_length(),
        planes=bounds.limit.bit_length() + 1, sink_tokens=sink_tokens,
        recent_tokens=recent_tokens, max_budget=max_budget, interpret=interpret,
    )  # fmt: skip
    budgets = jnp.minimum(budgets, ends)
    places = _select(codes, weights.reshape(plan.rows, -1), jnp.stack([ends, budgets], axis=1), plan)
    is_real = jnp.arange(max_budget, dtype=jnp.int32)[None, None, :] < budgets[:, None, None]
    shape = (batch, heads, max_budget)
    return places.reshape(shape), jnp.broadcast_to(is_real, shape)
