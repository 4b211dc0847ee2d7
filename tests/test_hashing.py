"""Hash functions: the network beside numpy loops, the LSH start, packing, query weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spotlight_jax import hashing
from spotlight_jax.errors import InputError
from spotlight_jax.hashing import HashConfig, HeadShape
from tests.tolerances import tolerance

BATCH, LEN, KV_HEADS, GROUP, HEAD_DIM, LAYERS = 2, 5, 3, 2, 16, 2
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
SQUARE = dataclasses.replace(SHAPE, head_dim=32)  # widths that skip "layers" can bridge

SYMMETRIC = HashConfig(form="symmetric", skip="none", code_bits=64, hidden=24, code_heads="query", centre=False)
FORMS = {
    "paper": SYMMETRIC,
    "released": dataclasses.replace(SYMMETRIC, skip="layers", code_bits=32, hidden=32),
    "shared code": dataclasses.replace(SYMMETRIC, skip="rotation", code_heads="kv", centre=True),
    "asymmetric": HashConfig(code_bits=64, hidden=24),
    "asymmetric, not centred": HashConfig(code_bits=32, hidden=20, centre=False),
}


# jitted once: faster than eagerly, and arrays of numpy pass
hash_keys = jax.jit(hashing.hash_keys, static_argnums=2)
hash_queries = jax.jit(hashing.hash_queries, static_argnums=2)
key_codes = jax.jit(hashing.key_codes, static_argnums=2)
query_weights = jax.jit(hashing.query_weights, static_argnums=(2, 3))
pack_bits, unpack_bits, soft_sign = jax.jit(hashing.pack_bits), jax.jit(hashing.unpack_bits), jax.jit(hashing.soft_sign)


def head_shape(cfg):
    return SQUARE if cfg.skip == "layers" else SHAPE


def random_params(cfg, seed=0):
    """One layer's params with every leaf random, biases and output layers too, so that each part matters."""
    shape = dataclasses.replace(head_shape(cfg), layers=1)
    params = hashing.layer_params(hashing.init_params(jax.random.key(seed), cfg, shape), 0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32) for x in leaves])
    return drawn.replace(stats=drawn.stats.replace(scale=jnp.abs(drawn.stats.scale) + 0.5))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_queries(cfg, seed=1):
    return draw(seed, BATCH, LEN, Q_HEADS, head_shape(cfg).head_dim)


def draw_keys(cfg, seed=2, length=LEN):
    return draw(seed, BATCH, length, KV_HEADS, head_shape(cfg).head_dim)


def network_of(net, head, x, skip):
    """The paper's network for one head and one vector."""
    w1, b1, w2, b2 = (
        np.asarray(leaf[head], np.float64)
        for leaf in (net.hidden_kernel, net.hidden_bias, net.out_kernel, net.out_bias)
    )
    before = x @ w1 + b1
    hidden = before / (1 + np.exp(-before))
    if skip == "layers":
        hidden = hidden + x
    out = hidden @ w2 + b2
    if skip == "layers":
        out = out + hidden
    if skip == "rotation":
        out = out + x @ np.asarray(net.rotation[head], np.float64)
    return out


def expected_keys(params, keys, cfg):
    """Key side [batch, len, code_heads, code_bits], loop by loop."""
    code_heads = KV_HEADS if cfg.code_heads == "kv" else Q_HEADS
    out = np.zeros((*keys.shape[:2], code_heads, cfg.code_bits))
    for b, s, head in np.ndindex(out.shape[:3]):
        kv = head if cfg.code_heads == "kv" else head // GROUP
        key = keys[b, s, kv].astype(np.float64)
        if cfg.centre:
            key = (key - np.asarray(params.stats.mean[kv])) / np.asarray(params.stats.scale[kv])
        out[b, s, head] = network_of(params.weights.keys, head, key, cfg.skip)
    return out


def expected_queries(params, queries, cfg):
    """Query side [batch, len, q_heads, code_bits], loop by loop."""
    out = np.zeros((*queries.shape[:3], cfg.code_bits))
    for b, t, head in np.ndindex(out.shape[:3]):
        kv = head // GROUP
        query = queries[b, t, head].astype(np.float64)
        if cfg.centre:
            scale = np.asarray(params.stats.scale[kv], np.float64)
            members = queries[b, t, kv * GROUP : (kv + 1) * GROUP].astype(np.float64) * scale
            query = query * scale / np.sqrt(np.mean(members**2))
        if cfg.form == "asymmetric":
            gain = np.exp(np.asarray(params.weights.log_gain, np.float64)[head])
            out[b, t, head] = network_of(params.weights.queries, head, query, cfg.skip) * gain
        else:
            net = kv if cfg.code_heads == "kv" else head
            out[b, t, head] = network_of(params.weights.keys, net, query, cfg.skip)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_the_network_is_the_papers_for_each_head_of_keys_and_queries(form):
    cfg = FORMS[form]
    params, queries, keys = random_params(cfg), draw_queries(cfg), draw_keys(cfg)
    close = {**tolerance("float32"), "atol": 1e-4}  # sums of up to 32 products of size 10
    np.testing.assert_allclose(hash_keys(params, keys, cfg), expected_keys(params, keys, cfg), **close)
    np.testing.assert_allclose(hash_queries(params, queries, cfg), expected_queries(params, queries, cfg), **close)


@pytest.mark.parametrize("code_bits", [32, 64, 96])
@pytest.mark.parametrize("head_dim", [24, 32, 64, 80])
def test_planes_are_orthonormal_within_each_block_of_head_dim(code_bits, head_dim):
    planes = np.asarray(hashing.orthogonal_planes(jax.random.key(0), 2, head_dim, code_bits))
    assert planes.shape == (2, head_dim, code_bits)
    for head in range(2):
        for start in range(0, code_bits, head_dim):
            block = planes[head, :, start : start + head_dim]
            np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
    assert np.abs(planes[0] - planes[1]).max() > 0.1


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("code_bits", [32, 64, 96])
def test_step_0_of_the_rotation_skip_is_orthogonal_lsh(form, code_bits):
    cfg = HashConfig(form=form, skip="rotation", code_bits=code_bits, hidden=20)
    shape = HeadShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=64)
    stacked = hashing.init_params(jax.random.key(3), cfg, shape)
    keys, queries = draw(4, BATCH, LEN, KV_HEADS, 64), draw(5, BATCH, LEN, Q_HEADS, 64)
    for layer in range(LAYERS):
        params = hashing.layer_params(stacked, layer)
        planes = np.asarray(params.weights.keys.rotation)
        for head in range(KV_HEADS):
            for start in range(0, code_bits, 64):
                block = planes[head, :, start : start + 64]
                np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
        hashed, asked = hash_keys(params, keys, cfg), hash_queries(params, queries, cfg)
        for head in range(KV_HEADS):
            np.testing.assert_allclose(hashed[:, :, head], keys[:, :, head] @ planes[head], atol=1e-5)
        for head in range(Q_HEADS):  # a query is projected on the very planes of its keys, up to its length
            projected = queries[:, :, head] @ planes[head // GROUP]
            ratio = np.asarray(asked[:, :, head]) / projected
            np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=5e-3)
            assert (ratio > 0).all()
    rotations = np.asarray(stacked.weights.keys.rotation)
    assert np.abs(rotations[0] - rotations[1]).max() > 0.1


@pytest.mark.parametrize("skip", ["none", "layers"])
def test_the_papers_weights_start_normal_with_deviation_a_thousandth(skip):
    cfg = HashConfig(form="symmetric", skip=skip, code_bits=64, hidden=64, code_heads="query")
    net = hashing.init_params(jax.random.key(0), cfg, dataclasses.replace(SHAPE, head_dim=64)).weights.keys
    for kernel in (net.hidden_kernel, net.out_kernel):
        assert kernel.shape == (LAYERS, Q_HEADS, 64, 64)
        assert abs(float(jnp.std(kernel)) - 0.001) < 2e-5
        assert abs(float(jnp.mean(kernel))) < 2e-5
    assert not np.any(net.hidden_bias)
    assert not np.any(net.out_bias)
    assert net.rotation is None


def test_the_residual_form_starts_as_the_sign_of_its_input():
    cfg = FORMS["released"]
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, SQUARE), 0)
    keys = draw_keys(cfg)
    np.testing.assert_allclose(hash_keys(params, keys, cfg)[:, :, ::GROUP], keys, atol=0.1)


@pytest.mark.parametrize(
    ("set_bits", "words"),
    [
        ([0], [1, 0]),
        ([31], [0x80000000, 0]),
        ([32], [0, 1]),
        ([1, 4, 33, 63], [0b10010, 0x80000002]),
        ([], [0, 0]),
        (range(64), [0xFFFFFFFF, 0xFFFFFFFF]),
    ],
)
def test_bit_b_goes_to_bit_b_mod_32_of_word_b_div_32(set_bits, words):
    bits = np.zeros((2, 3, 64), bool)
    bits[1, 2, list(set_bits)] = True
    packed = np.asarray(pack_bits(bits))
    assert packed.shape == (2, 3, 2)
    assert packed.dtype == np.uint32
    assert packed[1, 2].tolist() == words
    assert not packed[0].any()


@given(hnp.arrays(bool, (2, 3, 96)))
def test_unpacking_undoes_packing(bits):
    np.testing.assert_array_equal(unpack_bits(pack_bits(bits)), bits)


@given(hnp.arrays(np.uint32, (2, 3, 2)))
def test_packing_undoes_unpacking(words):
    np.testing.assert_array_equal(pack_bits(unpack_bits(words)), words)


@pytest.mark.parametrize("form", FORMS)
def test_key_codes_are_the_signs_packed_word_major(form):
    cfg = FORMS[form]
    params, keys = random_params(cfg), draw_keys(cfg, length=7)
    expected = expected_keys(params, keys, cfg)
    codes = np.asarray(key_codes(params, keys, cfg))
    assert codes.shape == (BATCH, expected.shape[2], cfg.words, 7)
    for b, s, head, bit in np.ndindex(expected.shape):
        if abs(expected[b, s, head, bit]) > 1e-4:
            assert (int(codes[b, head, bit // 32, s]) >> (bit % 32)) & 1 == (expected[b, s, head, bit] > 0)


def test_above_0_is_bit_1_and_0_is_bit_0():
    cfg = dataclasses.replace(SYMMETRIC, code_bits=32)
    zero = jax.tree.map(jnp.zeros_like, random_params(cfg))
    values = np.zeros(32, np.float32)
    values[[1, 5]], values[[2, 6]], values[3] = 1e-20, -1e-20, -0.0
    net = zero.weights.keys.replace(out_bias=jnp.tile(values, (Q_HEADS, 1)))
    params = zero.replace(weights=zero.weights.replace(keys=net))
    assert set(np.asarray(key_codes(params, draw_keys(cfg), cfg)).ravel().tolist()) == {0b100010}
    weights = np.asarray(query_weights(params, draw_queries(cfg), cfg))
    np.testing.assert_array_equal(weights, np.broadcast_to(np.where(values > 0, 1, -1), weights.shape))


@given(hnp.arrays(bool, (2, 3, 64)))
def test_a_code_matches_itself_in_all_bits_and_its_complement_in_none(bits):
    weights = np.where(bits, 1, -1)  # what `query_weights` makes of such a code
    ones = bits.sum(-1)

    def matches(code):
        """Number of equal bits from the score: sum_b w_b bit_b = matches - (bits of the query that are 0)."""
        unpacked = np.asarray(unpack_bits(pack_bits(code)))
        return (weights * unpacked).sum(-1) + 64 - ones

    assert (matches(bits) == 64).all()
    assert (matches(~bits) == 0).all()


LARGEST = 7  # of weights of four bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_query_weights_are_signs_or_few_bits_of_the_query_side(form, per_kv_head):
    cfg = FORMS[form]
    if per_kv_head and cfg.code_heads == "query":
        return  # needs one code per KV head
    params, queries = random_params(cfg), draw_queries(cfg)
    outputs = expected_queries(params, queries, cfg)
    if cfg.form == "symmetric":
        outputs = np.where(outputs > 0, 1, -1)
    if per_kv_head:  # sums come before rounding
        outputs = outputs.reshape(BATCH, LEN, KV_HEADS, GROUP, -1).sum(3)
    if cfg.form == "asymmetric":
        outputs = outputs * LARGEST / np.abs(outputs).max(-1, keepdims=True)
    weights = np.asarray(query_weights(params, queries, cfg, per_kv_head))
    assert weights.dtype == np.int32
    limit = hashing.weight_limit(cfg, GROUP, per_kv_head)
    assert limit == (LARGEST if cfg.form == "asymmetric" else GROUP if per_kv_head else 1)
    assert np.abs(weights).max() <= limit
    if cfg.form == "asymmetric":
        assert (np.abs(weights).max(-1) == LARGEST).all()
        assert np.abs(weights - outputs).max() < 0.51
    else:
        np.testing.assert_array_equal(weights, outputs)


@given(st.integers(0, 2**16))
def test_rounding_weights_moves_a_score_by_at_most_half_a_unit_per_bit(seed):
    cfg = FORMS["asymmetric"]
    params, queries = random_params(cfg), draw_queries(cfg, seed=seed)
    real = np.asarray(hash_queries(params, queries, cfg), np.float64)
    weights = np.asarray(query_weights(params, queries, cfg), np.float64)
    unit = np.abs(real).max(-1, keepdims=True) / LARGEST
    codes = np.random.default_rng(seed).integers(0, 2, (cfg.code_bits, 40))
    error = np.abs(real @ codes - unit * weights @ codes)
    assert (error <= 0.5001 * unit * codes.sum(0)).all()


def test_a_query_of_zeros_has_finite_weights():
    cfg = FORMS["asymmetric"]
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, SHAPE), 0)
    assert not np.any(query_weights(params, np.zeros_like(draw_queries(cfg)), cfg))


def draw_uneven(*lead):
    """Keys and queries whose dimensions have spreads of their own."""
    spreads = np.geomspace(0.1, 10, HEAD_DIM).astype(np.float32)
    keys = draw(0, *lead, BATCH, LEN, KV_HEADS, HEAD_DIM) * spreads + 5
    return keys, draw(1, *lead, BATCH, LEN, Q_HEADS, HEAD_DIM) * spreads[::-1] ** 0.5


def test_statistics_centre_keys_and_give_both_sides_equal_spreads():
    keys, queries = draw_uneven(LAYERS)
    stats = hashing.fit_stats(jnp.asarray(keys), jnp.asarray(queries))
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        own = keys[layer, :, :, head].astype(np.float64).reshape(-1, HEAD_DIM)
        summed = queries[layer].reshape(-1, KV_HEADS, GROUP, HEAD_DIM)[:, head].sum(1).astype(np.float64)
        np.testing.assert_allclose(stats.mean[layer, head], own.mean(0), rtol=1e-4)
        scale = np.asarray(stats.scale[layer, head], np.float64)
        centred = (own - own.mean(0)) / scale
        ratio = centred.std(0) / np.sqrt(np.mean((summed * scale) ** 2, axis=0))
        np.testing.assert_allclose(ratio, np.full(HEAD_DIM, ratio[0]), rtol=1e-3)
        np.testing.assert_allclose(np.mean(centred**2), 1.0, rtol=1e-3)


def test_a_dimension_that_never_varies_has_a_finite_scale():
    keys, queries = draw_uneven(LAYERS)
    keys[..., 2, 4], queries[..., 4:6, 3] = 7.0, 0.0
    stats = hashing.fit_stats(jnp.asarray(keys), jnp.asarray(queries))
    assert np.isfinite(stats.scale).all() and (np.asarray(stats.scale) > 0).all()


def test_centring_keeps_the_order_of_true_scores():
    """With planes that keep everything (an orthonormal square), centred weights times centred keys rank as q . k."""
    cfg = HashConfig(code_bits=32, hidden=20)
    shape = dataclasses.replace(SHAPE, head_dim=32, layers=1)
    keys, queries = draw(6, BATCH, 40, KV_HEADS, 32) * 4 + 3, draw(7, BATCH, LEN, Q_HEADS, 32)
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, shape), 0)
    params = params.replace(stats=hashing.fit_stats(jnp.asarray(keys), jnp.asarray(queries)))
    hashed, asked = np.asarray(hash_keys(params, keys, cfg)), np.asarray(hash_queries(params, queries, cfg))
    for b, t, head in np.ndindex(BATCH, LEN, Q_HEADS):
        true = keys[b, :, head // GROUP].astype(np.float64) @ queries[b, t, head]
        centred = hashed[b, :, head // GROUP] @ asked[b, t, head]
        np.testing.assert_array_equal(np.argsort(true), np.argsort(centred))


@pytest.mark.parametrize("gamma", [0.5, 4.0, 64.0])
def test_the_soft_sign_is_the_papers(gamma):
    x = np.array([[-3.0, -0.01, 0.0], [0.01, 0.5, 20.0]], np.float32)
    expected = [[gamma * v / (1 + gamma * abs(v)) for v in row] for row in x.tolist()]
    np.testing.assert_allclose(soft_sign(x, gamma), expected, **tolerance("float32"))


@given(hnp.arrays(np.float32, (2, 8), elements=st.floats(-10, 10, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)))
def test_the_soft_sign_tends_to_the_sign(x):
    # gamma |x| / (1 + gamma |x|) is 1 / (1 + gamma |x|) short of 1
    np.testing.assert_allclose(soft_sign(x, 1e7), np.sign(x), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"code_bits": 48}, "code_bits is 48"),
        ({"code_bits": 0}, "code_bits is 0"),
        ({"code_bits": 288}, "code_bits is 288"),
        ({"hidden": 0}, "hidden is 0"),
        ({"form": "asymmetric", "code_heads": "query"}, "code-heads kv"),
    ],
)
def test_what_no_hash_function_can_be_built_from_is_named(fields, names):
    with pytest.raises(InputError, match=names):
        HashConfig(**fields)


@pytest.mark.parametrize(("hidden", "code_bits", "head_dim"), [(64, 32, 32), (32, 64, 32), (32, 32, 64)])
def test_identities_between_unequal_widths_are_refused_with_all_three(hidden, code_bits, head_dim):
    cfg = dataclasses.replace(SYMMETRIC, skip="layers", hidden=hidden, code_bits=code_bits)
    shape = dataclasses.replace(SHAPE, head_dim=head_dim)
    with pytest.raises(InputError, match=rf"hidden \({hidden}\), code_bits \({code_bits}\).*head_dim \({head_dim}\)"):
        hashing.init_params(jax.random.key(0), cfg, shape)
