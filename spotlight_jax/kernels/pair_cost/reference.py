"""Pair sums by their meaning: the paper's equation over an explicit pair tensor."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@flax.struct.dataclass
class PairSums:
    """What is summed over pairs; slopes are derivatives of the cost, by top scores never positive."""

    cost: Float[Array, "*batch"]
    wrong: Float[Array, "*batch"]  # pairs in which the other key scores higher
    top_slopes: Float[Array, "*batch tops"]
    other_slopes: Float[Array, "*batch others"]


def pair_sums_reference(
    top_scores: Float[Array, "*batch tops"],
    top_weights: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
) -> PairSums:
    """Sum top_weight * softplus(other - top + alpha), and its derivative top_weight * sigmoid(other - top + alpha)."""
    weights = jnp.where(is_other[..., None, :], top_weights[..., :, None], 0.0)
    gaps = other_scores[..., None, :] - top_scores[..., :, None]
    slopes = weights * jax.nn.sigmoid(gaps + alpha)
    return PairSums(
        cost=jnp.sum(weights * jax.nn.softplus(gaps + alpha), axis=(-2, -1)),
        wrong=jnp.sum(jnp.where((weights > 0) & (gaps > 0), 1.0, 0.0), axis=(-2, -1)),
        top_slopes=-jnp.sum(slopes, axis=-1),
        other_slopes=jnp.sum(slopes, axis=-2),
    )
