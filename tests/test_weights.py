"""Integer weights: rounding on one scale, and the scores they can give."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spotlight_jax import weights
from spotlight_jax.weights import WeightBounds, real_bounds

BATCH, HEADS, SUMS = 2, 3, 2
LIMIT, TOTAL = 127, 1020

halves, quantise = jax.jit(weights.halves), jax.jit(weights.quantise)
draws = given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 128, 256]), st.sampled_from([0.0, 0.5, 2.0, 6.0]))


def draw_weights(seed, code_bits, unevenness):
    """From weights of one magnitude to a few that are all there is."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 1, (BATCH, HEADS, SUMS, code_bits)) * unevenness)
    return (sizes * rng.choice([-1, 1], sizes.shape) * 10 ** rng.uniform(-6, 6)).astype(np.float32)


def common_scale(real, found):
    """Least and greatest number per query and head that rounds all its real weights to those found."""
    sizes, rounded = np.abs(real.astype(np.float64)), np.abs(found)
    return ((rounded - 0.5) / sizes).max((-2, -1)), ((rounded + 0.5) / sizes).min((-2, -1))


@draws
def test_integer_weights_stay_within_their_bounds(seed, code_bits, unevenness):
    found = np.asarray(quantise(draw_weights(seed, code_bits, unevenness)))
    assert found.dtype == np.int32
    assert np.abs(found).max() <= real_bounds(code_bits).limit == LIMIT
    assert np.abs(found).sum(-1).max() <= real_bounds(code_bits).total == TOTAL


@draws
def test_integer_weights_are_as_large_as_rounding_allows(seed, code_bits, unevenness):
    found = np.abs(np.asarray(quantise(draw_weights(seed, code_bits, unevenness))))
    is_at_limit = found.max((-2, -1)) == LIMIT
    assert (is_at_limit | (found.sum(-1).max(-1) >= TOTAL - code_bits)).all()  # half a unit a bit is room for rounding


@draws
def test_all_sums_of_a_query_are_rounded_on_one_scale(seed, code_bits, unevenness):
    real = draw_weights(seed, code_bits, unevenness)
    real[:, :, 1] *= 0.03  # a scale of its own would make these as large
    found = np.asarray(quantise(real))
    assert (found * real >= 0).all()
    least, greatest = common_scale(real, found)
    assert (least <= greatest * (1 + 1e-5)).all()


@draws
def test_rounding_moves_a_score_by_at_most_half_a_unit_per_bit(seed, code_bits, unevenness):
    real = draw_weights(seed, code_bits, unevenness)
    found = np.asarray(quantise(real), np.int64)
    scale = np.mean(common_scale(real, found), axis=0)
    bits = np.random.default_rng(seed).integers(0, 2, (code_bits, 40))
    scores = (found @ bits - np.asarray(halves(found.astype(np.int32)))[..., None]).max(-2)
    signed = (real.astype(np.float64) @ (bits - 0.5)).max(-2) * scale[..., None]
    bound = code_bits / 4 + 0.5  # half of each weight's half unit, and half a unit where a sum is odd
    assert np.abs(scores - signed).max() <= bound * (1 + 1e-5)


@draws
def test_a_querys_length_does_not_matter(seed, code_bits, unevenness):
    real = draw_weights(seed, code_bits, unevenness)
    np.testing.assert_array_equal(quantise(real * np.float32(2**-9)), quantise(real))


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        ([1e-3], [127]),
        ([2.0, -1.0], [127, -64]),  # 63.5 goes to the even one
        ([-3.0] * 32, [-31] * 32),  # (1020 - 16) / 32 is 31.375
        ([0.5] * 8 + [-0.5] * 8, [63] * 8 + [-63] * 8),  # 1004 / 16 is 62.75
    ],
)
def test_rounding_by_hand(real, expected):
    padded = np.zeros((1, 32), np.float32)
    padded[0, : len(real)] = real
    assert np.asarray(quantise(padded))[0, : len(real)].tolist() == expected


def test_weights_of_zero_and_next_to_zero_stay_finite():
    real = np.zeros((BATCH, HEADS, SUMS, 32), np.float32)
    assert not np.any(quantise(real))
    real[1, 2, 0, 5], real[0, 1, 1] = -4.0, 1e-38
    found = np.asarray(quantise(real))
    assert found[1, 2, 0, 5] == -127
    assert np.count_nonzero(found) == 1


@pytest.mark.parametrize("code_bits", [32, 128, 256])
def test_extreme_weights_stay_within_their_bounds(code_bits):
    real = np.full((4, SUMS, code_bits), 1e-3, np.float32)
    real[1, 0, 7] = -3e30  # one weight is all there is
    real[2, 1], real[3, 1] = 0.0, -1e30
    found = np.asarray(quantise(real), np.int64)
    assert np.abs(found).max() <= LIMIT and np.abs(found).sum(-1).max() <= TOTAL
    same = min(LIMIT, round((TOTAL - code_bits // 2) / code_bits))
    assert (found[0] == same).all() and (found[2, 0] == same).all() and not found[2, 1].any()
    assert found[1, 0, 7] == -LIMIT and np.count_nonzero(found[1]) == 1
    assert not found[3, 0].any() and (found[3, 1] == -same).all()


@given(hnp.arrays(np.int32, (BATCH, 9), elements=st.integers(-127, 127)))
def test_a_half_is_rounded_down(drawn):
    expected = [sum(row) // 2 for row in drawn.tolist()]
    assert halves(drawn).tolist() == expected


def test_halves_by_hand():
    assert halves(np.array([[3, -2, 5], [-4, 1, 0], [2, 2, 1]], np.int32)).tolist() == [3, -2, 2]


@pytest.mark.parametrize(("limit", "total"), [(1, 4), (2, 5), (3, 6), (3, 7)])
def test_no_score_of_any_weights_and_code_leaves_the_range(limit, total):
    least, greatest = WeightBounds(limit, total).score_range
    choices = itertools.product(range(-limit, limit + 1), repeat=4)
    rows = np.array([row for row in choices if sum(map(abs, row)) <= total], np.int32)
    bits = np.array(list(itertools.product((0, 1), repeat=4)))
    scores = rows @ bits.T - np.asarray(halves(rows))[:, None]
    assert scores.max() == greatest
    assert scores.min() == least + total % 2  # halves of odd sums are rounded down: the least is one higher


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 8, 63, 64, 127])
def test_bits_are_the_fewest_that_hold_every_weight(limit):
    fewest = next(bits for bits in range(2, 9) if limit < 2 ** (bits - 1))
    assert WeightBounds(limit, 9 * limit).bits == (1 if limit == 1 else fewest)  # one bit: +1 or -1


@pytest.mark.parametrize("code_bits", [32, 128, 256])
def test_scores_of_real_weights_and_what_no_score_has_fit_ten_bits(code_bits):
    least, greatest = real_bounds(code_bits).score_range
    assert (least, greatest) == (-510, 510)
    assert greatest - least + 2 < 2**10  # as `selection.rank_tokens` counts
