"""match_score: the highest of sums of weights over packed codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlight_jax.errors import InputError
from spotlight_jax.kernels import match_score as op
from spotlight_jax.kernels.match_score.cases import CASES
from spotlight_jax.weights import WeightBounds
from tests.kernels.cuda import lower_for_cuda

IMPLEMENTATIONS = ["reference", "bit_planes", "matmul"]
BATCH, CODE_HEADS, WORDS, KV_LEN = 2, 3, 4, 40

match_score = jax.jit(op.match_score, static_argnums=(2, 3))


def draw_codes(rng, batch=BATCH, code_heads=CODE_HEADS, words=WORDS, kv_len=KV_LEN):
    return rng.integers(0, 2**32, (batch, code_heads, words, kv_len), dtype=np.uint32)


def draw_weights(rng, shape, weight_bits):
    if weight_bits == 1:
        return (rng.integers(0, 2, shape) * 2 - 1).astype(np.int32)
    return rng.integers(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), shape).astype(np.int32)


def scores_by_numpy(codes, weights):
    """Bit by bit with Python's own shifts; nothing shared with the op."""
    batch, code_heads, words, kv_len = codes.shape
    _, q_len, heads, sums, _ = weights.shape
    weights = weights.astype(np.int64)
    out = np.zeros((batch, q_len, heads, sums, kv_len), np.int64) - (weights.sum(-1) // 2)[..., None]
    for head in range(heads):
        code = codes[:, head // (heads // code_heads)].astype(np.int64)
        for bit in range(32 * words):
            is_set = (code[:, bit // 32] >> (bit % 32)) & 1
            out[:, :, head] += weights[:, :, head, :, bit, None] * is_set[:, None, None]
    return out.max(axis=3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight_bits", [1, 4, 8])
@pytest.mark.parametrize(("group", "sums"), [(1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("q_len", [1, 5])
def test_every_implementation_equals_numpy(impl, weight_bits, group, sums, q_len):
    rng = np.random.default_rng(weight_bits * 10 + group)
    codes = draw_codes(rng)
    weights = draw_weights(rng, (BATCH, q_len, CODE_HEADS * group, sums, 32 * WORDS), weight_bits)
    scores = match_score(codes, weights, weight_bits, impl)
    np.testing.assert_array_equal(scores, scores_by_numpy(codes, weights))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 4, 8]))
def test_the_most_extreme_weights_are_summed_exactly(seed, words, weight_bits):
    rng = np.random.default_rng(seed)
    codes = draw_codes(rng, 1, 1, words, 8)
    codes[..., 0] = 0xFFFFFFFF
    least, greatest = (-1, 1) if weight_bits == 1 else (-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1)
    for weight in (least, greatest):
        weights = np.full((1, 1, 1, 1, 32 * words), weight, np.int32)
        scores = match_score(jnp.asarray(codes), jnp.asarray(weights), weight_bits)
        np.testing.assert_array_equal(scores, scores_by_numpy(codes, weights))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_sums_by_hand(impl):
    """Their halves are 3, of 6, and -2, of -3."""
    codes = np.array([0b011, 0b110, 0b000, 0b101], np.uint32).reshape(1, 1, 1, 4)
    weights = np.zeros((1, 1, 1, 2, 32), np.int32)
    weights[..., :3] = [[3, -2, 5], [-4, 1, 0]]
    first, second = [-2, 0, -3, 5], [-1, 3, 2, -2]
    for sums, expected in ((weights[..., :1, :], first), (weights[..., 1:, :], second), (weights, [-1, 3, 2, 5])):
        assert match_score(jnp.asarray(codes), jnp.asarray(sums), 8, impl).ravel().tolist() == expected


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bounds", [WeightBounds(127, 1020), WeightBounds(7, 7 * 128), WeightBounds(1, 128)])
def test_scores_reach_both_ends_of_their_range_and_no_further(impl, bounds):
    rng = np.random.default_rng(4)
    sizes = np.zeros(32 * WORDS, np.int32)
    full, rest = divmod(bounds.total, bounds.limit)
    sizes[:full], sizes[full : full + 1] = bounds.limit, rest
    weights = rng.permutation(sizes) * rng.choice([-1, 1], sizes.size)
    best = np.packbits(weights > 0, bitorder="little").view("<u4")
    codes = draw_codes(rng, 1, 1)
    codes[0, 0, :, 3], codes[0, 0, :, 9] = best, ~best
    call = codes, weights[None, None, None, None].astype(np.int32)
    scores = np.asarray(match_score(*map(jnp.asarray, call), bounds.bits, impl))
    np.testing.assert_array_equal(scores, scores_by_numpy(*call))
    assert (scores.min(), scores.max()) == bounds.score_range
    assert (scores[..., 9], scores[..., 3]) == bounds.score_range


def test_a_sum_given_twice_changes_nothing_and_sums_may_change_places():
    rng = np.random.default_rng(5)
    codes = jnp.asarray(draw_codes(rng))
    weights = jnp.asarray(draw_weights(rng, (BATCH, 1, CODE_HEADS, 2, 32 * WORDS), 8))
    one, both = match_score(codes, weights[:, :, :, :1], 8), match_score(codes, weights, 8)
    assert (np.asarray(one) != both).any()
    np.testing.assert_array_equal(match_score(codes, weights[:, :, :, [0, 0]], 8), one)
    np.testing.assert_array_equal(match_score(codes, weights[:, :, :, ::-1], 8), both)


def test_sign_weights_rank_tokens_as_the_papers_popcount_of_xnor():
    rng = np.random.default_rng(0)
    codes, queries = draw_codes(rng), draw_codes(rng, kv_len=1)
    bits = (queries[..., 0, None] >> np.arange(32, dtype=np.uint32)) & 1
    weights = (bits.astype(np.int32) * 2 - 1).reshape(BATCH, 1, CODE_HEADS, 1, 32 * WORDS)
    equal_bits = np.bitwise_count(~(codes ^ queries)).sum(axis=2).astype(np.int64)
    gap = equal_bits - np.asarray(match_score(jnp.asarray(codes), jnp.asarray(weights), 1))[:, 0]
    np.testing.assert_array_equal(gap, np.broadcast_to(gap[..., :1], gap.shape))  # one constant per query


def test_a_code_scores_highest_against_itself_and_lowest_against_its_complement():
    rng = np.random.default_rng(1)
    codes = draw_codes(rng)
    codes[..., 7] = ~codes[..., 5]
    bits = (codes[:, :, :, 5, None] >> np.arange(32, dtype=np.uint32)) & 1
    weights = (bits.astype(np.int32) * 2 - 1).reshape(BATCH, 1, CODE_HEADS, 1, 32 * WORDS)
    scores = np.asarray(match_score(jnp.asarray(codes), jnp.asarray(weights), 1))
    assert (scores.argmax(-1) == 5).all() and (scores.argmin(-1) == 7).all()


def test_permuting_the_cache_permutes_the_scores():
    rng = np.random.default_rng(2)
    codes, order = draw_codes(rng), rng.permutation(KV_LEN)
    weights = draw_weights(rng, (BATCH, 1, 2 * CODE_HEADS, 2, 32 * WORDS), 8)
    scores = np.asarray(match_score(jnp.asarray(codes), jnp.asarray(weights), 8))
    np.testing.assert_array_equal(
        match_score(jnp.asarray(codes[..., order]), jnp.asarray(weights), 8), scores[..., order]
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.q_len == 1], ids=lambda case: case.name)
def test_a_gpu_counts_the_bits_of_a_decoding_step(case):
    arrays = jax.eval_shape(lambda: case.draw()[0])
    assert "popcnt" in lower_for_cuda(functools.partial(op.match_score, weight_bits=case.weight_bits), *arrays)


@pytest.mark.parametrize("shape", [(BATCH, 1, 4, 2, 128), (BATCH, 1, 3, 2, 64), (1, 1, 3, 2, 128)])
def test_shapes_that_do_not_fit_are_named(shape):
    codes = jnp.zeros((BATCH, CODE_HEADS, WORDS, KV_LEN), jnp.uint32)
    with pytest.raises((InputError, TypeError)):
        match_score(codes, jnp.zeros(shape, jnp.int32), 8)
