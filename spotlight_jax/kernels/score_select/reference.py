"""What the fused operation means: score every code, then sort by score and position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, Int32, UInt32

from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.kernels.select_top.reference import select_top_reference
from spotlight_jax.weights import WeightBounds


def score_select_reference(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int8[Array, "batch heads sums code_bits"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    bounds: WeightBounds,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """`score_select` by sorting."""
    scores = match_score(codes, weights[:, None].astype(jnp.int32), bounds.bits, impl="reference")[:, 0]
    least, greatest = bounds.score_range
    positions = jnp.arange(codes.shape[-1], dtype=jnp.int32)[None, None, :]
    ends = ends[:, None, None]
    is_always_read = (positions < sink_tokens) | (positions >= ends - recent_tokens)
    ranks = jnp.where(is_always_read, greatest - least + 2, scores - least + 1)
    ranks = jnp.where(positions < ends, ranks, 0).astype(jnp.uint32)
    budgets = jnp.broadcast_to(jnp.minimum(budgets, ends[:, 0, 0])[:, None], ranks.shape[:2])
    return select_top_reference(ranks, budgets, max_budget)
