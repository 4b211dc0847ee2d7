"""What the fused operation means: score every code, then choose by score and position; two ops, one after the other."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.kernels.select_top import select_top
from spotlight_jax.kernels.select_top.ranks import force_ranks
from spotlight_jax.token_axis import first_slot
from spotlight_jax.weights import WeightBounds


def score_select_in_parts(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int[Array, "batch heads score_heads code_bits"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    bounds: WeightBounds,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    impl: Literal["auto", "reference"] = "auto",
    axis: str | None = None,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """Compute `score_select` by `match_score` and `select_top`, both of the implementation that is named."""
    scores = match_score(codes, weights[:, None].astype(jnp.int32), bounds.bits, impl)[:, 0]
    least, greatest = bounds.score_range
    rows = jnp.broadcast_to(ends[:, None], scores.shape[:2])
    budgets = jnp.broadcast_to(jnp.minimum(budgets, ends)[:, None], scores.shape[:2])
    ranks = (scores - least + 1).astype(jnp.uint32)
    first = first_slot(codes.shape[-1], axis)
    ranks = force_ranks(ranks, rows, greatest - least + 2, sink_tokens, recent_tokens, first)
    return select_top(ranks, budgets, max_budget, bounds.rank_bits, impl, axis)
