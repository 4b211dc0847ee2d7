"""Pair sums as fused reductions: pairs exist only inside them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spotlight_jax.kernels.pair_cost.factors import pair_factors
from spotlight_jax.kernels.pair_cost.reference import PairSums


def pair_sums_xla(
    top_scores: Float[Array, "*batch tops"],
    top_weights: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
) -> PairSums:
    """Compute `pair_sums`, where each sum writes its pairs its own way (axis order, factors): XLA then fuses each with
    its pairs, where equal expressions would be computed once and kept, the pair tensor in full."""
    tops, others = pair_factors(top_scores, other_scores, is_other, alpha)
    by_top = (2.0 * tops)[..., :, None] * (0.5 * others)[..., None, :]
    cost = jnp.sum(top_weights * jnp.sum(jnp.log1p(by_top), axis=-1), axis=-1)
    top_slopes = (
        top_weights * tops * jnp.sum(others[..., None, :] / (1 + tops[..., :, None] * others[..., None, :]), -1)
    )
    weighed = top_weights * tops
    other_slopes = others * jnp.sum(weighed[..., None, :] / (1 + others[..., :, None] * tops[..., None, :]), -1)
    real_tops = jnp.where(top_weights > 0, top_scores, jnp.inf)  # keys that are in no pair: put where they never lose
    real_others = jnp.where(is_other, other_scores, -jnp.inf)
    is_wrong = real_tops[..., :, None] < real_others[..., None, :]
    wrong = jnp.sum(jnp.sum(jnp.where(is_wrong, 1.0, 0.0), axis=-1), axis=-1)
    return PairSums(cost=cost, wrong=wrong, top_slopes=-top_slopes, other_slopes=other_slopes)
