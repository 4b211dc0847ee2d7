"""Scores, the cut and its compaction in one kernel or a few: codes are read once, ranks are counted where they lie.

A row is one selecting head of one sequence; its sums of weights share what is read and masked of a code. Where there
are many rows, a program owns one (`row_programs`); else chunks of rows are programs, and three kernels hand histograms
on (`chunk_programs`).

Weights are multiplied four at a time: bits of a word taken eight apart are four bytes of 0 or 2^j, which `dp4a`
multiplies with four int8 weights and adds up, exactly. A histogram has 32 bins: a thread counts in fields of four bits,
eight to a number, and the program adds them up at the end. Counts are whole numbers and every choice has one place, so
a run gives the same result bit for bit every time. Needs nothing newer than compute capability 6.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from spotlight_jax.kernels.score_select.chunk_programs import select_by_chunks
from spotlight_jax.kernels.score_select.plan import Plan
from spotlight_jax.kernels.score_select.row_programs import has_program_a_row, select_by_rows
from spotlight_jax.weights import WeightBounds


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
    has_rows: bool | None = None,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """As the reference. `has_rows` says which form runs, else the number of rows and their length do."""
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
    if has_rows is None:
        has_rows = has_program_a_row(plan.rows, kv_len)
    select = select_by_rows if has_rows else select_by_chunks
    places = select(codes, weights.reshape(plan.rows, -1), jnp.stack([ends, budgets], axis=1), plan)
    is_real = jnp.arange(max_budget, dtype=jnp.int32)[None, None, :] < budgets[:, None, None]
    shape = (batch, heads, max_budget)
    return places.reshape(shape), jnp.broadcast_to(is_real, shape)
