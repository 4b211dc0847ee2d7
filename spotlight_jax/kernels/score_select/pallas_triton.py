"""Scores, the cut and its compaction in two kernels: codes are read once, ranks are counted where they lie.

A row is one selecting head of one sequence. Programs own chunks of rows, so that a GPU is full however few rows there
are:

score     codes -> ranks, and how often each rank occurs
compact   the cut from the histograms of all chunks, which also say where a chunk's choice goes; ties to the newest
          chunks first

Tensor cores count the bits that codes share with the planes of the weights, exactly (`scoring`). A histogram has a bin
for every rank, in shared memory (`counting`); its sums of neighbouring bins say where to look.
Ranks are stored to stay in the L2 cache, and codes make room first: what a step computes on the way shares the memory
of the ranks, and all that is read waits where it goes to memory and back.
Counts are whole numbers and every choice has one place, so a run gives the same result bit for bit every time. Needs
compute capability 8.0, as binary matrix products do.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int8, Int32, UInt32

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.score_select.compaction import load_ranks, store_chosen
from spotlight_jax.kernels.score_select.config import CONFIGS
from spotlight_jax.kernels.score_select.counting import count_ranks, find_bin, read_counts, start_counting
from spotlight_jax.kernels.score_select.plan import PARTS, Bounds, Plan, clear_free_slots, read_bounds, slots_of, walk
from spotlight_jax.kernels.score_select.scoring import ranker_of
from spotlight_jax.kernels.select_top.counting import own_ties
from spotlight_jax.kernels.triton import Index, Ref
from spotlight_jax.token_axis import first_slot
from spotlight_jax.weights import WeightBounds


def _score_kernel(
    bounds_ref: Ref, weights_ref: Ref, codes_ref: Ref, ranks_ref: Ref, counts_ref: Ref, parts_ref: Ref,
    *, plan: Plan, chunk: int,
) -> None:  # fmt: skip
    start, bounds = pl.program_id(1) * chunk, read_bounds(bounds_ref)
    step_len = plan.cfg.step
    rank, there = ranker_of(weights_ref, bounds, step_len, plan), jnp.minimum(chunk, plan.kv_len - start)

    def load_words(step: Index) -> list[Array]:
        at, is_there = slots_of(step, step_len, there)
        words = [codes_ref.at[jnp.int32(word), at] for word in range(plan.words)]
        return [plgpu.load(word, mask=is_there, other=0, eviction_policy="evict_first") for word in words]

    def score_step(step: Index, words: list[Array], counted: Any) -> Any:
        ranks = rank(words, start + step * step_len)
        at, is_there = slots_of(step, step_len, jnp.minimum(chunk, plan.rank_len - start))
        plgpu.store(ranks_ref.at[at], ranks.astype(ranks_ref.dtype), mask=is_there, eviction_policy="evict_last")
        return count_ranks(ranks, counted, plan)

    @pl.when(start < bounds.end)  # nothing is written of other chunks
    def count() -> None:
        counted = walk(chunk // step_len, load_words, score_step, start_counting(step_len, plan))
        for index, counts in enumerate(read_counts(counted, plan)):
            counts_ref[pl.ds(index * counts.size, counts.size)] = counts.astype(counts_ref.dtype)
            parts = jnp.sum(counts.reshape(-1, plan.bins_of_part), axis=1)
            parts_ref[pl.ds(index * parts.size, parts.size)] = parts


def _look(
    counts_ref: Ref, start: Index, bins: int, wanted: Array, is_filled: Bool[Array, "lanes"]
) -> tuple[Array, Array, Array, Array]:
    """Return which of `bins` bins holds the last of a row's `wanted` tokens.

    Returns: the bin; tokens in bins before it, the row's and each chunk's; each chunk's tokens in it.
    """
    lanes, places = jnp.arange(is_filled.size)[:, None], jnp.arange(bins)[None, :]
    is_there = jnp.broadcast_to(lanes < counts_ref.shape[0], (lanes.size, bins))
    counts = plgpu.load(counts_ref.at[lanes, start + places], mask=is_there, other=0).astype(jnp.int32)
    counts = jnp.where(is_filled[:, None], counts, 0)  # nothing was written of chunks without tokens
    found, before = find_bin(jnp.sum(counts, axis=0), wanted)
    both = jnp.sum(jnp.where(places < found, counts, jnp.where(places == found, counts << 16, 0)), axis=1)
    return found, before, both & 0xFFFF, lax.shift_right_logical(both, 16)


def _compact_kernel(
    bounds_ref: Ref, counts_ref: Ref, parts_ref: Ref, words_ref: Ref, places_ref: Ref, *, plan: Plan, chunk: int
) -> None:
    words = load_ranks(words_ref, chunk, plan)  # these are on their way while the cut is found
    bounds, own, count = read_bounds(bounds_ref), pl.program_id(1), counts_ref.shape[0]
    budget = bounds.budget
    chunks = jnp.arange(1 << (count - 1).bit_length(), dtype=jnp.int32)
    is_filled, width = chunks * chunk < bounds.end, plan.bins_of_part
    part, above_part, above, _ = _look(parts_ref, 0, PARTS, budget, is_filled)
    found, above_bin, above_in_part, ties = _look(counts_ref, part * width, width, budget - above_part, is_filled)
    cut, above, wanted = plan.bins - 1 - part * width - found, above + above_in_part, budget - above_part - above_bin
    newer = jnp.sum(jnp.where(chunks > own, ties, 0))
    counts = jnp.sum(jnp.where(chunks == own, (above << 16) + ties, 0))
    own_above, own_ties = lax.shift_right_logical(counts, 16), counts & 0xFFFF
    taken = jnp.clip(wanted - newer, 0, own_ties)
    first = jnp.sum(jnp.where(chunks < own, above, 0)) + jnp.maximum(wanted - newer - own_ties, 0)

    @pl.when(own_above + taken > 0)
    def compact() -> None:
        store_chosen(words, cut, own_ties, own_ties - taken, first, own * chunk, places_ref, plan)

    @pl.when(own == count - 1)
    def clear() -> None:
        clear_free_slots(places_ref, budget, plan, plan.cfg.wide_step)


def _select(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int8[Array, "rows bits_of_sums"],
    bounds: Bounds,
    plan: Plan,
    axis: str | None,
) -> tuple[Int32[Array, "rows max_budget"], Int32[Array, "rows"]]:
    """Return chosen positions of every row, and how many: the row's budget, or this device's share of it."""
    rows, heads, group = plan.rows, plan.heads, plan.heads // plan.code_heads
    chunk = plan.cfg.choose_chunk(rows, plan.kv_len)
    chunks = -(-plan.kv_len // chunk)

    def row_of(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda row, chunk: (row,) + (0,) * len(shape))

    of_codes = pl.BlockSpec(
        (None, None, plan.words, chunk), lambda row, chunk: (row // heads, row % heads // group, 0, chunk)
    )
    of_ranks, of_words = (pl.BlockSpec((None, width), lambda row, chunk: (row, chunk)) for width in (chunk, chunk // 2))
    own_bins, own_parts = (pl.BlockSpec((None, None, places), lambda *at: (*at, 0)) for places in (plan.bins, PARTS))
    out_shape = [
        jax.ShapeDtypeStruct((rows, plan.rank_len), jnp.int16),
        jax.ShapeDtypeStruct((rows, chunks, plan.bins), jnp.int16),
        jax.ShapeDtypeStruct((rows, chunks, PARTS), jnp.int32),
    ]

    def call(kernel: Callable[..., None], name: str, warps: int, **specs: Any) -> Callable[..., Any]:
        kernel = functools.partial(kernel, plan=plan, chunk=chunk)
        params = plgpu.CompilerParams(num_warps=warps, num_stages=plan.cfg.stages)
        return pl.pallas_call(
            kernel, name=name, grid=(rows, chunks), interpret=plan.interpret, compiler_params=params, **specs
        )

    of_bounds = row_of(len(bounds))
    ranks, counts, parts = call(
        _score_kernel, "score_ranks", plan.cfg.score_warps, in_specs=[of_bounds, row_of(weights.shape[1]), of_codes],
        out_specs=[of_ranks, own_bins, own_parts], out_shape=out_shape,
    )(jnp.stack(bounds, axis=1), weights, codes)  # fmt: skip
    if axis is not None:
        is_filled = jnp.arange(chunks, dtype=jnp.int32)[None] * chunk < bounds.end[:, None]
        own = jnp.sum(jnp.where(is_filled[..., None], counts, 0), axis=1, dtype=jnp.int32)
        bounds = bounds._replace(budget=_own_budgets(own, bounds.budget, axis))
    words = lax.bitcast_convert_type(ranks.reshape(rows, -1, 2), jnp.int32)
    places = call(
        _compact_kernel, "compact_chosen", plan.cfg.compact_warps,
        in_specs=[of_bounds, row_of(chunks, plan.bins), row_of(chunks, PARTS), of_words],
        out_specs=row_of(plan.max_budget), out_shape=jax.ShapeDtypeStruct((rows, plan.max_budget), jnp.int32),
    )(jnp.stack(bounds, axis=1), counts, parts, words)  # fmt: skip
    return places, bounds.budget


def _own_budgets(counts: Int32[Array, "rows bins"], budgets: Int32[Array, "rows"], axis: str) -> Int32[Array, "rows"]:
    """Return how many of the tokens that rows choose on all devices are on this one.

    One exchange of histograms, whose size does not depend on the cache's, says it all.

    Args:
        counts: how often each rank occurs on this device, the highest first.
        budgets: tokens that each row chooses on all devices.
        axis: over which tokens are split.
    """
    of_all = lax.all_gather(counts, axis)
    reached = jnp.cumsum(jnp.sum(of_all, axis=0), axis=1)
    is_above = reached < budgets[:, None]  # bins whose tokens are all chosen, and more than those
    places, found = jnp.arange(counts.shape[1])[None], jnp.sum(is_above, axis=1, dtype=jnp.int32)[:, None]
    wanted = budgets - jnp.max(jnp.where(is_above, reached, 0), axis=1)
    ties = jnp.sum(jnp.where(places == found, of_all, 0), axis=2)  # [devices, rows]
    return jnp.sum(jnp.where(is_above, counts, 0), axis=1) + own_ties(ties, wanted, axis)


def score_select_pallas_triton(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int8[Array, "batch heads score_heads code_bits"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    bounds: WeightBounds,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    axis: str | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """Compute `score_select` by two kernels."""
    batch, code_heads, words, kv_len = codes.shape
    heads, sums = weights.shape[1:3]
    plan = Plan(
        batch=batch, heads=heads, code_heads=code_heads, words=words, kv_len=kv_len,
        sums=sums, least=bounds.score_range[0], rank_bits=bounds.rank_bits,
        planes=bounds.limit.bit_length() + 1, max_budget=max_budget, interpret=interpret, cfg=config_here(CONFIGS),
    )  # fmt: skip
    own_ends = ends - first_slot(kv_len, axis)
    sinks = sink_tokens - first_slot(kv_len, axis) + jnp.zeros_like(ends)
    by_sequence = Bounds(sinks, own_ends - recent_tokens, jnp.clip(own_ends, 0, kv_len), jnp.minimum(budgets, ends))
    of_rows = Bounds(*(jnp.repeat(bound, heads) for bound in by_sequence))
    places, counts = _select(codes, weights.reshape(plan.rows, -1), of_rows, plan, axis)
    is_real = jnp.arange(max_budget, dtype=jnp.int32)[None, :] < counts[:, None]
    shape = (batch, heads, max_budget)
    return places.reshape(shape), is_real.reshape(shape)
