"""pair_cost: sums over pairs of softplus, and their slopes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax.kernels.pair_cost import pair_cost, pair_sums
from spotlight_jax.kernels.pair_cost.cases import CASES
from spotlight_jax.kernels.pair_cost.pallas_triton import pair_sums_pallas_triton
from tests.kernels.cuda import lower_for_cuda

ALPHA = 3.0
SUMS = {
    "reference": functools.partial(pair_sums, alpha=ALPHA, impl="reference"),
    "xla": functools.partial(pair_sums, alpha=ALPHA, impl="xla"),
    "pallas_triton": functools.partial(pair_sums_pallas_triton, alpha=ALPHA, interpret=True),
}
SUMS = {name: jax.jit(run) for name, run in SUMS.items()}


def draw_scores(seed, spread, others_above=0.0):
    rng = np.random.default_rng(seed)
    top = rng.uniform(-spread, spread, (2, 3, 5))
    other = rng.uniform(-spread, spread, (2, 3, 21)) + others_above
    weights = rng.uniform(0, 2, top.shape) * (rng.random(top.shape) < 0.8)
    is_other = rng.random(other.shape) < 0.7
    is_other[1, 2] = False  # a row without others
    return [x.astype(np.float32) for x in (top, weights, other)] + [is_other]


def sums_by_numpy(top, weights, other, is_other):
    """Cost, wrong pairs and slopes of each row, in float64."""
    gaps = other[..., None, :].astype(np.float64) - top[..., :, None]
    pair_weights = weights[..., :, None].astype(np.float64) * is_other[..., None, :]
    slopes = pair_weights / (1 + np.exp(-gaps - ALPHA))
    costs = pair_weights * np.logaddexp(gaps + ALPHA, 0)
    return costs.sum((-2, -1)), ((pair_weights > 0) & (gaps > 0)).sum((-2, -1)), -slopes.sum(-1), slopes.sum(-2)


def assert_sums_are(found, expected, rtol=1e-4):
    np.testing.assert_allclose(found.cost, expected[0], rtol=rtol, atol=1e-5)
    np.testing.assert_array_equal(found.wrong, expected[1])
    np.testing.assert_allclose(found.top_slopes, expected[2], rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(found.other_slopes, expected[3], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("impl", SUMS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0, 30.0])
@given(seed=st.integers(0, 2**16))
def test_every_implementation_is_the_softplus_formula(impl, spread, seed):
    """A spread of 30 makes gaps of up to +-60."""
    scores = draw_scores(seed, spread)
    assert_sums_are(SUMS[impl](*scores), sums_by_numpy(*scores))


@pytest.mark.parametrize("impl", SUMS)
@pytest.mark.parametrize("gap", [-60.0, -45.0, 41.0, 60.0])
def test_a_single_pair_far_apart_keeps_its_cost_and_slope(impl, gap):
    top, other = np.full((1, 1), -gap / 2, np.float32), np.full((1, 1), gap / 2, np.float32)
    scores = top, np.ones((1, 1), np.float32), other, np.ones((1, 1), bool)
    found, expected = SUMS[impl](*scores), sums_by_numpy(*scores)
    np.testing.assert_allclose(found.top_slopes, expected[2], rtol=1e-4)
    np.testing.assert_allclose(found.other_slopes, expected[3], rtol=1e-4)


@pytest.mark.parametrize("impl", SUMS)
def test_masked_others_far_above_change_nothing(impl):
    top, weights, other, is_other = draw_scores(5, 3.0)
    plain = SUMS[impl](top, weights, other, is_other)
    poisoned = SUMS[impl](top, weights, np.where(is_other, other, 1e6).astype(np.float32), is_other)
    for one, other_one in zip(jax.tree.leaves(plain), jax.tree.leaves(poisoned), strict=True):
        np.testing.assert_array_equal(one, other_one)


@pytest.mark.parametrize("impl", SUMS)
def test_rows_without_others_cost_nothing_and_stay_finite(impl):
    top, weights, other, is_other = draw_scores(6, 30.0)
    sums = SUMS[impl](top, weights, other, np.zeros_like(is_other))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(sums))


def test_the_gradient_of_the_cost_is_the_plain_formulas_by_autodiff():
    top, weights, other, is_other = (jnp.asarray(x) for x in draw_scores(3, 5.0))

    def softplus_cost(top, other):
        gaps = other[..., None, :] - top[..., :, None] + ALPHA
        costs = jnp.where(is_other[..., None, :], jnp.logaddexp(gaps, jnp.zeros_like(gaps)), 0.0)
        return 0.5 * jnp.sum(costs * weights[..., :, None])

    found = jax.grad(lambda a, b: pair_cost(a, weights, b, is_other, ALPHA)[0] * 0.5, (0, 1))(top, other)
    for grad, expected in zip(found, jax.grad(softplus_cost, (0, 1))(top, other), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_lowers_for_cuda_at_every_real_shape(case):
    shapes = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in jax.eval_shape(lambda: case.draw()[0])]
    cost = functools.partial(pair_cost, alpha=ALPHA, impl="pallas_triton")
    layers = jax.jit(jax.vmap(jax.value_and_grad(cost, (0, 2), has_aux=True)))  # as a trainer maps over layers
    assert "pair_sums" in lower_for_cuda(layers, *shapes)
