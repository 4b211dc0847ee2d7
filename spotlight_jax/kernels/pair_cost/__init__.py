"""Bradley-Terry cost of all pairs of a top and another key, and its slopes, without a pair tensor that is kept."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.pair_cost.pallas_triton import pair_sums_pallas_triton
from spotlight_jax.kernels.pair_cost.reference import PairSums, pair_sums_reference
from spotlight_jax.kernels.pair_cost.xla import pair_sums_xla
from spotlight_jax.kernels.trust import is_trusted

__all__ = ["SLOPES", "PairCostImpl", "PairSums", "choose_impl", "pair_cost", "pair_sums"]

PairCostImpl = Literal["auto", "reference", "xla", "pallas_triton"]

SLOPES = "pair_slopes"  # what a checkpoint policy may save, so that pairs are not gone through twice


def choose_impl() -> PairCostImpl:
    """Return the implementation `auto` takes: one kernel on a GPU that passes its check, fused sums elsewhere."""
    return "pallas_triton" if is_trusted("pair_cost", _agree) else "xla"


def _agree() -> bool:
    """Return whether kernel and reference agree on a few rows."""
    keys = jax.random.split(jax.random.key(0), 4)
    top, other = (3 * jax.random.normal(key, (4, count)) for key, count in zip(keys[:2], (10, 40), strict=True))
    weights, is_other = jax.random.uniform(keys[2], top.shape), jax.random.bernoulli(keys[3], 0.8, other.shape)
    found, expected = (
        jax.jit(functools.partial(pair_sums, alpha=3.0, impl=impl))(top, weights, other, is_other)
        for impl in ("pallas_triton", "reference")
    )
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(bool(jnp.allclose(one, two, rtol=1e-3, atol=1e-3)) for one, two in pairs)


def pair_sums(
    top_scores: Float[Array, "*batch tops"],
    top_weights: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
    impl: PairCostImpl = "auto",
) -> PairSums:
    """Return sums over each row's pairs: cost, pairs ranked wrongly, and the slopes of the cost by either score.

    Args:
        top_scores: of each row's sampled top keys.
        top_weights: at least 0; a top key of weight 0 is in no pair.
        other_scores: of its other keys.
        is_other: which others are in pairs.
        alpha: margin by which a top key should win, in units of scores.
        impl: `auto` chooses by device; a named implementation runs or raises.
    """
    backends: dict[str, Callable[..., PairSums]] = {
        "reference": pair_sums_reference,
        "xla": pair_sums_xla,
        "pallas_triton": pair_sums_pallas_triton,
    }
    run = pick_backend("pair_cost", backends, impl, choose_impl)
    return run(top_scores, top_weights, other_scores, is_other, alpha)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def pair_cost(
    top_scores: Float[Array, "*batch tops"],
    top_weights: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
    impl: PairCostImpl = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over pairs of top_weight * softplus(other - top + alpha), and how many pairs have other > top.

    Differentiable in the scores alone: the weights are constants of the loss.
    """
    sums = pair_sums(top_scores, top_weights, other_scores, is_other, alpha, impl)
    return jnp.sum(sums.cost), jnp.sum(sums.wrong)


def _forward(
    top_scores: Array, top_weights: Array, other_scores: Array, is_other: Array, alpha: float, impl: PairCostImpl
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    sums = pair_sums(top_scores, top_weights, other_scores, is_other, alpha, impl)
    slopes = checkpoint_name(sums.top_slopes, SLOPES), checkpoint_name(sums.other_slopes, SLOPES)
    return (jnp.sum(sums.cost), jnp.sum(sums.wrong)), slopes


def _backward(
    alpha: float, impl: PairCostImpl, slopes: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, np.ndarray]:
    top_slopes, other_slopes = slopes
    zeros = jnp.zeros_like(top_slopes)
    no_gradient = np.zeros(other_slopes.shape, jax.dtypes.float0)
    return cotangents[0] * top_slopes, zeros, cotangents[0] * other_slopes, no_gradient


pair_cost.defvjp(_forward, _backward)
