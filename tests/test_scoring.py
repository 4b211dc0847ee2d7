"""Scores of cached tokens beside loops over unpacked bits and plain dot products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax import hashing, scoring
from spotlight_jax.hashing import HashConfig, HeadShape
from tests.tolerances import tolerance

BATCH, Q_LEN, KV_HEADS, GROUP, HEAD_DIM, KV_LEN = 2, 3, 2, 3, 16, 37
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=1, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)

PAPER = HashConfig(form="symmetric", skip="none", code_bits=64, hidden=24, code_heads="query", centre=False)
FORMS = {
    "paper": PAPER,
    "shared code": dataclasses.replace(PAPER, skip="rotation", code_heads="kv"),
    "asymmetric": HashConfig(code_bits=64, hidden=24),
}
CASES = [(form, per_kv_head) for form in FORMS for per_kv_head in (False, True)]

hash_scores = jax.jit(scoring.hash_scores, static_argnums=(3, 4))
exact_scores = jax.jit(scoring.exact_scores, static_argnums=2)
query_weights = jax.jit(hashing.query_weights, static_argnums=(2, 3))


def random_params(cfg):
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, SHAPE), 0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    drawn = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32) for x in leaves])
    return drawn.replace(stats=drawn.stats.replace(scale=jnp.abs(drawn.stats.scale) + 0.5))


PARAMS = {form: random_params(cfg) for form, cfg in FORMS.items()}


def draw_queries(seed, q_len=Q_LEN):
    return np.random.default_rng(seed).normal(size=(BATCH, q_len, Q_HEADS, HEAD_DIM)).astype(np.float32)


def draw_keys(seed):
    return np.random.default_rng(seed).normal(size=(BATCH, KV_LEN, KV_HEADS, HEAD_DIM)).astype(np.float32)


def draw_codes(seed, cfg):
    heads = KV_HEADS if cfg.code_heads == "kv" else Q_HEADS
    return np.random.default_rng(seed).integers(0, 2**32, (BATCH, heads, cfg.words, KV_LEN), dtype=np.uint32)


def bits_of(codes):
    """[batch, code_heads, kv_len, code_bits], a shift for each bit."""
    bits = [(codes[:, :, b // 32] >> np.uint32(b % 32)) & 1 for b in range(codes.shape[2] * 32)]
    return np.stack(bits, -1).astype(np.int64)


def expected_scores(weights, codes, heads):
    """sum_b weight_b bit_b, loop by loop; summed over the group where each query head has its own code."""
    bits = bits_of(codes)
    scores = np.zeros((*weights.shape[:3], codes.shape[-1]), np.int64)
    for b, t, head in np.ndindex(weights.shape[:3]):
        scores[b, t, head] = bits[b, head // (weights.shape[2] // codes.shape[1])] @ weights[b, t, head]
    if scores.shape[2] != heads:
        scores = np.stack([scores[:, :, k * GROUP : (k + 1) * GROUP].sum(2) for k in range(heads)], 2)
    return scores


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@pytest.mark.parametrize("q_len", [1, Q_LEN, 17])
def test_a_score_is_the_sum_of_weights_where_the_code_has_a_bit(form, per_kv_head, q_len):
    cfg, params = FORMS[form], PARAMS[form]
    queries, codes = draw_queries(1, q_len), draw_codes(2, cfg)
    has_own_codes = cfg.code_heads == "query"
    weights = np.asarray(query_weights(params, queries, cfg, per_kv_head and not has_own_codes), np.int64)
    found = np.asarray(hash_scores(params, queries, codes, cfg, per_kv_head))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected_scores(weights, codes, KV_HEADS if per_kv_head else Q_HEADS))


@pytest.mark.parametrize("form", ["paper", "shared code"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_symmetric_scores_rank_tokens_as_popcount_of_xnor_does(form, per_kv_head):
    cfg, params = FORMS[form], PARAMS[form]
    queries, codes = draw_queries(3), draw_codes(4, cfg)
    signs = np.asarray(query_weights(params, queries, cfg, False)) > 0
    words = np.zeros((*signs.shape[:3], cfg.words), np.uint32)
    for bit in range(cfg.code_bits):
        words[..., bit // 32] |= signs[..., bit].astype(np.uint32) << np.uint32(bit % 32)
    matches = np.zeros((BATCH, Q_LEN, Q_HEADS, KV_LEN), np.int64)
    for b, t, head in np.ndindex(matches.shape[:3]):
        mine = codes[b, head if form == "paper" else head // GROUP]
        matches[b, t, head] = np.bitwise_count(~(mine ^ words[b, t, head][:, None])).sum(0)
    if per_kv_head:
        matches = np.stack([matches[:, :, k * GROUP : (k + 1) * GROUP].sum(2) for k in range(KV_HEADS)], 2)
    lead = matches - np.asarray(hash_scores(params, queries, codes, cfg, per_kv_head))
    np.testing.assert_array_equal(lead, np.broadcast_to(lead[..., :1], lead.shape))  # one constant per query


@pytest.mark.parametrize("form", ["paper", "shared code"])
def test_a_key_equal_to_the_query_scores_highest_and_its_complement_lowest(form):
    cfg, params = FORMS[form], PARAMS[form]
    queries, codes = draw_queries(5, q_len=1), draw_codes(6, cfg)
    signs = np.asarray(query_weights(params, queries, cfg, False))[:, 0] > 0
    own = np.asarray(jax.jit(hashing.pack_bits)(signs))
    own = own if form == "paper" else own[:, ::GROUP]  # the first query head of each group
    codes[..., 11], codes[..., 23] = own, ~own
    scores = np.asarray(hash_scores(params, queries, codes, cfg, False))[:, 0]
    ones = signs.sum(-1)
    scores, ones = (scores, ones) if form == "paper" else (scores[:, ::GROUP], ones[:, ::GROUP])
    np.testing.assert_array_equal(scores[..., 11], ones)  # all bits match
    np.testing.assert_array_equal(scores[..., 23], ones - cfg.code_bits)  # none does
    assert (scores.argmax(-1) == 11).all()
    assert (scores.argmin(-1) == 23).all()


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@given(seed=st.integers(0, 2**16))
def test_scores_stay_in_their_range(form, per_kv_head, seed):
    cfg, params = FORMS[form], PARAMS[form]
    least, greatest = scoring.hash_score_range(cfg, GROUP, per_kv_head)
    queries, codes = draw_queries(seed), draw_codes(seed, cfg)
    codes[..., 0] = 0xFFFFFFFF
    scores = np.asarray(hash_scores(params, queries, codes, cfg, per_kv_head))
    assert scores.min() >= least
    assert scores.max() <= greatest


@pytest.mark.parametrize(
    ("form", "per_kv_head", "bound"),
    [("paper", False, 64), ("paper", True, 192), ("shared code", True, 192), ("asymmetric", True, 7 * 64)],
)
def test_ranges_are_code_bits_times_the_largest_weight(form, per_kv_head, bound):
    assert scoring.hash_score_range(FORMS[form], GROUP, per_kv_head) == (-bound, bound)


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@given(seed=st.integers(0, 2**16))
def test_permuting_the_cache_permutes_scores(form, per_kv_head, seed):
    cfg, params = FORMS[form], PARAMS[form]
    order = np.random.default_rng(seed).permutation(KV_LEN)
    queries, codes = draw_queries(seed), draw_codes(seed, cfg)
    scores = np.asarray(hash_scores(params, queries, codes, cfg, per_kv_head))
    np.testing.assert_array_equal(hash_scores(params, queries, codes[..., order], cfg, per_kv_head), scores[..., order])
    keys = draw_keys(seed)
    exact = np.asarray(exact_scores(queries, keys, per_kv_head))
    moved = exact_scores(queries, keys[:, order], per_kv_head)
    np.testing.assert_allclose(moved, exact[..., order], **tolerance("float32"))


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_exact_scores_are_dot_products_and_their_sums_over_a_group(per_kv_head):
    queries, keys = draw_queries(7), draw_keys(8)
    expected = np.zeros((BATCH, Q_LEN, Q_HEADS, KV_LEN))
    for b, t, head in np.ndindex(expected.shape[:3]):
        expected[b, t, head] = keys[b, :, head // GROUP].astype(np.float64) @ queries[b, t, head]
    if per_kv_head:
        expected = np.stack([expected[:, :, k * GROUP : (k + 1) * GROUP].sum(2) for k in range(KV_HEADS)], 2)
    np.testing.assert_allclose(exact_scores(queries, keys, per_kv_head), expected, **tolerance("float32"))


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_exact_scores_of_bfloat16_are_float32(per_kv_head):
    queries, keys = (x.astype(jnp.bfloat16) for x in (draw_queries(9), draw_keys(10)))
    found = np.asarray(exact_scores(queries, keys, per_kv_head))
    assert found.dtype == np.float32
    wide = exact_scores(queries.astype(np.float32), keys.astype(np.float32), per_kv_head)
    np.testing.assert_allclose(found, wide, **tolerance("float32"))
