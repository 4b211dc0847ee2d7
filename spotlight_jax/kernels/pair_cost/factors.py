"""A pair's exp(other - top + alpha) as a product of one factor a side: no exponential a pair."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EXPONENT_LIMIT = 80.0  # a pair lost by more than this costs as much as this; exp(80) still fits float32


def pair_factors(
    top_scores: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
) -> tuple[Float[Array, "*batch tops"], Float[Array, "*batch others"]]:
    """Return a factor for each key: with ratio = top factor * other factor a pair costs log(1 + ratio), and its slope
    is ratio / (1 + ratio)."""
    highest = jnp.max(jnp.where(is_other, other_scores, -jnp.inf), axis=-1, keepdims=True)
    highest = jnp.where(highest > -jnp.inf, highest, 0.0)
    tops = jnp.exp(jnp.minimum(highest - top_scores + alpha, EXPONENT_LIMIT))
    others = jnp.where(is_other, jnp.exp(jnp.minimum(other_scores - highest, 0.0)), 0.0)
    return tops, others
