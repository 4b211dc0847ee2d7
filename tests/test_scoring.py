"""Scores of cached tokens beside loops over unpacked bits and plain dot products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax.bits import pack_bits
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.selector import scoring
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from tests.hash_params import draw_params
from tests.tolerances import tolerance

BATCH, Q_LEN, KV_HEADS, GROUP, HEAD_DIM, KV_LEN = 2, 3, 2, 3, 16, 37
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=1, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)

PAPER = NetworkConfig(form="symmetric", skip="none", code_bits=64, hidden=24, code_heads="query", centre=False)
FORMS = {
    "paper": PAPER,
    "shared code": dataclasses.replace(PAPER, skip="rotation", code_heads="kv"),
    "asymmetric": NetworkConfig(form="asymmetric", code_bits=64, hidden=24),
    "transform": TransformConfig(code_bits=64),
    "transform, one sum": TransformConfig(code_bits=64, sums=1),
}
CASES = [(form, per_kv_head) for form in FORMS for per_kv_head in (False, True)]

hash_scores = jax.jit(scoring.hash_scores, static_argnums=3)
exact_scores = jax.jit(scoring.exact_scores, static_argnums=2)
query_weights = jax.jit(lambda params, x, per_kv_head=False: params.query_weights(x, per_kv_head), static_argnums=2)
sum_weights = jax.jit(lambda params, x, per_kv_head=False: params.score_heads(x, per_kv_head), static_argnums=2)


@functools.cache
def random_params(cfg):
    if cfg.form == "transform":
        return draw_params(cfg, SHAPE).layer(0)
    params = init_functions(jax.random.key(0), cfg, SHAPE).layer(0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    drawn = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32) for x in leaves])
    return drawn.replace(stats=drawn.stats.replace(scale=jnp.abs(drawn.stats.scale) + 0.5))


def params_of(form):
    return random_params(FORMS[form])


def draw_queries(seed, q_len=Q_LEN):
    return np.random.default_rng(seed).normal(size=(BATCH, q_len, Q_HEADS, HEAD_DIM)).astype(np.float32)


def draw_keys(seed):
    return np.random.default_rng(seed).normal(size=(BATCH, KV_LEN, KV_HEADS, HEAD_DIM)).astype(np.float32)


def draw_codes(seed, cfg):
    heads = KV_HEADS if cfg.code_heads == "kv" else Q_HEADS
    return np.random.default_rng(seed).integers(0, 2**32, (BATCH, heads, cfg.code_bits // 32, KV_LEN), dtype=np.uint32)


def bits_of(codes):
    """[batch, code_heads, kv_len, code_bits], a shift for each bit."""
    bits = [(codes[:, :, b // 32] >> np.uint32(b % 32)) & 1 for b in range(codes.shape[2] * 32)]
    return np.stack(bits, -1).astype(np.int64)


def expected_scores(weights, codes, heads):
    """The highest sum_b weight_b bit_b less half of the weights, loop by loop; summed over the group where each query
    head has its own code."""
    bits = bits_of(codes)
    scores = np.zeros((*weights.shape[:3], codes.shape[-1]), np.int64)
    for b, t, head in np.ndindex(weights.shape[:3]):
        own = bits[b, head // (weights.shape[2] // codes.shape[1])]
        scores[b, t, head] = np.max([own @ row - sum(row.tolist()) // 2 for row in weights[b, t, head]], axis=0)
    if scores.shape[2] != heads:
        scores = np.stack([scores[:, :, k * GROUP : (k + 1) * GROUP].sum(2) for k in range(heads)], 2)
    return scores


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@pytest.mark.parametrize("q_len", [1, Q_LEN, 17])
def test_a_score_is_the_highest_sum_of_weights_where_the_code_has_a_bit(form, per_kv_head, q_len):
    cfg, params = FORMS[form], params_of(form)
    queries, codes = draw_queries(1, q_len), draw_codes(2, cfg)
    has_own_codes = cfg.code_heads == "query"
    weights = np.asarray(query_weights(params, queries, per_kv_head and not has_own_codes), np.int64)
    found = np.asarray(hash_scores(params, queries, codes, per_kv_head))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected_scores(weights, codes, KV_HEADS if per_kv_head else Q_HEADS))


@pytest.mark.parametrize("form", ["paper", "shared code"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_symmetric_scores_rank_tokens_as_popcount_of_xnor_does(form, per_kv_head):
    cfg, params = FORMS[form], params_of(form)
    queries, codes = draw_queries(3), draw_codes(4, cfg)
    signs = np.asarray(query_weights(params, queries, False))[:, :, :, 0] > 0
    words = np.zeros((*signs.shape[:3], cfg.code_bits // 32), np.uint32)
    for bit in range(cfg.code_bits):
        words[..., bit // 32] |= signs[..., bit].astype(np.uint32) << np.uint32(bit % 32)
    matches = np.zeros((BATCH, Q_LEN, Q_HEADS, KV_LEN), np.int64)
    for b, t, head in np.ndindex(matches.shape[:3]):
        mine = codes[b, head if form == "paper" else head // GROUP]
        matches[b, t, head] = np.bitwise_count(~(mine ^ words[b, t, head][:, None])).sum(0)
    if per_kv_head:
        matches = np.stack([matches[:, :, k * GROUP : (k + 1) * GROUP].sum(2) for k in range(KV_HEADS)], 2)
    lead = matches - np.asarray(hash_scores(params, queries, codes, per_kv_head))
    np.testing.assert_array_equal(lead, np.broadcast_to(lead[..., :1], lead.shape))  # one constant per query


@pytest.mark.parametrize("form", ["paper", "shared code"])
def test_a_key_equal_to_the_query_scores_highest_and_its_complement_lowest(form):
    cfg, params = FORMS[form], params_of(form)
    queries, codes = draw_queries(5, q_len=1), draw_codes(6, cfg)
    signs = np.asarray(query_weights(params, queries, False))[:, 0, :, 0] > 0
    own = np.asarray(jax.jit(pack_bits)(signs))
    own = own if form == "paper" else own[:, ::GROUP]  # the first query head of each group
    codes[..., 11], codes[..., 23] = own, ~own
    scores = np.asarray(hash_scores(params, queries, codes, False))[:, 0]
    scores = scores if form == "paper" else scores[:, ::GROUP]
    assert (scores[..., 11] == cfg.code_bits // 2).all()  # all bits match
    assert (scores[..., 23] == -cfg.code_bits // 2).all()  # none does
    assert (scores.argmax(-1) == 11).all()
    assert (scores.argmin(-1) == 23).all()


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@given(seed=st.integers(0, 2**16))
def test_scores_stay_in_their_range(form, per_kv_head, seed):
    cfg, params = FORMS[form], params_of(form)
    least, greatest = scoring.hash_score_range(params, GROUP, per_kv_head)
    queries, codes = draw_queries(seed), draw_codes(seed, cfg)
    codes[..., 0] = 0xFFFFFFFF
    signs = np.asarray(query_weights(params, queries, False))[:, 0, :: Q_HEADS // codes.shape[1], 0] > 0
    codes[..., 1] = np.packbits(signs, axis=-1, bitorder="little").view("<u4")  # the highest score of some query
    codes[..., 2] = ~codes[..., 1]
    scores = np.asarray(hash_scores(params, queries, codes, per_kv_head))
    assert scores.min() >= least
    assert scores.max() <= greatest


@pytest.mark.parametrize(
    ("form", "per_kv_head", "bound"),
    [
        ("paper", False, 32),
        ("paper", True, 96),
        ("shared code", False, 32),
        ("shared code", True, 96),
        ("asymmetric", True, 510),
        ("transform", True, 510),
        ("transform", False, 510),
    ],
)
def test_ranges_are_half_of_all_weights_together(form, per_kv_head, bound):
    assert scoring.hash_score_range(params_of(form), GROUP, per_kv_head) == (-bound, bound)


def test_the_higher_of_two_sums_counts():
    """A group's second sum holds its second query head alone, as `draw_params` has it."""
    cfg, params = FORMS["transform"], params_of("transform")
    queries, codes = draw_queries(11), draw_codes(12, cfg)
    both = np.asarray(hash_scores(params, queries, codes, True))
    weights = np.asarray(query_weights(params, queries, True), np.int64)
    each = np.stack([expected_scores(weights[:, :, :, row : row + 1], codes, KV_HEADS) for row in range(2)])
    np.testing.assert_array_equal(both, each.max(0))
    assert 0.1 < np.mean(each[0] > each[1]) < 0.9


@pytest.mark.parametrize("form", ["asymmetric", "transform", "transform, one sum"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_scores_rank_tokens_as_real_weights_do_to_half_a_unit_a_bit(form, per_kv_head):
    cfg, params = FORMS[form], params_of(form)
    queries, codes = draw_queries(13), draw_codes(14, cfg)
    outputs = jax.jit(lambda params, x: params.hash_queries(x))(params, queries)
    weights = np.asarray(sum_weights(params, outputs, per_kv_head), np.float64)
    sizes = np.abs(weights)
    scale = np.minimum(127 / sizes.max((-2, -1)), (1020 - cfg.code_bits / 2) / sizes.sum(-1).max(-1))
    signs, group = bits_of(codes) - 0.5, weights.shape[2] // KV_HEADS
    signs = np.repeat(signs, group, axis=1)
    real = np.einsum("bthrc,bhsc->bthrs", weights * scale[..., None, None], signs).max(3)
    found = np.asarray(hash_scores(params, queries, codes, per_kv_head))
    lead = real[..., :, None] - real[..., None, :]
    is_ahead = lead > cfg.code_bits / 2 + 1  # half of a score's weights are rounded down besides
    assert 0.3 < is_ahead.mean() < 0.5
    assert (found[..., :, None] - found[..., None, :])[is_ahead].min() >= 0


@pytest.mark.parametrize(("form", "per_kv_head"), CASES)
@given(seed=st.integers(0, 2**16))
def test_permuting_the_cache_permutes_scores(form, per_kv_head, seed):
    cfg, params = FORMS[form], params_of(form)
    order = np.random.default_rng(seed).permutation(KV_LEN)
    queries, codes = draw_queries(seed), draw_codes(seed, cfg)
    scores = np.asarray(hash_scores(params, queries, codes, per_kv_head))
    np.testing.assert_array_equal(hash_scores(params, queries, codes[..., order], per_kv_head), scores[..., order])
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
