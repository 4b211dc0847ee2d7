"""Hash functions: networks and fixed-point digits beside numpy loops, the LSH start, packing, query weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spotlight_jax import bits
from spotlight_jax.config import hashing
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.hash_append import reference as transform
from spotlight_jax.selector import networks
from spotlight_jax.selector.base import HeadShape, orthogonal_planes
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.networks import KeyStats
from spotlight_jax.weights import WeightBounds
from tests.hash_params import draw_params
from tests.tolerances import tolerance

BATCH, LEN, KV_HEADS, GROUP, HEAD_DIM, LAYERS = 2, 5, 3, 2, 16, 2
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
SQUARE = dataclasses.replace(SHAPE, head_dim=32)  # widths that skip "layers" can bridge

SYMMETRIC = NetworkConfig(form="symmetric", skip="none", code_bits=64, hidden=24, code_heads="query", centre=False)
FORMS = {
    "paper": SYMMETRIC,
    "released": dataclasses.replace(SYMMETRIC, skip="layers", code_bits=32, hidden=32),
    "shared code": dataclasses.replace(SYMMETRIC, skip="rotation", code_heads="kv", centre=True),
    "asymmetric": NetworkConfig(form="asymmetric", code_bits=64, hidden=24),
    "asymmetric, not centred": NetworkConfig(form="asymmetric", code_bits=32, hidden=20, centre=False),
}
TRANSFORM, DIGITS = TransformConfig(code_bits=64), 4  # of each of the axes that `draw_params` gives

# jitted once: faster than eagerly, and arrays of numpy pass
hash_keys = jax.jit(lambda params, x: params.hash_keys(x))
hash_queries = jax.jit(lambda params, x: params.hash_queries(x))
key_codes = jax.jit(lambda params, x: params.key_codes(x))
query_weights = jax.jit(lambda params, x, per_kv_head=False: params.query_weights(x, per_kv_head), static_argnums=2)
sum_weights = jax.jit(lambda params, x, per_kv_head=False: params.score_heads(x, per_kv_head), static_argnums=2)
pack_bits, unpack_bits, soft_sign = (jax.jit(run) for run in (bits.pack_bits, bits.unpack_bits, networks.soft_sign))


def head_shape(cfg):
    return SQUARE if isinstance(cfg, NetworkConfig) and cfg.skip == "layers" else SHAPE


@functools.cache
def random_params(cfg, seed=0):
    """One layer's params with every leaf random, biases and output layers too, so that each part matters."""
    shape = dataclasses.replace(head_shape(cfg), layers=1)
    params = init_functions(jax.random.key(seed), cfg, shape).layer(0)
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
            gain = np.exp(np.asarray(params.weights.log_head_scale, np.float64)[head])
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
    np.testing.assert_allclose(hash_keys(params, keys), expected_keys(params, keys, cfg), **close)
    np.testing.assert_allclose(hash_queries(params, queries), expected_queries(params, queries, cfg), **close)


@pytest.mark.parametrize("code_bits", [32, 64, 96])
@pytest.mark.parametrize("head_dim", [24, 32, 64, 80])
def test_planes_are_orthonormal_within_each_block_of_head_dim(code_bits, head_dim):
    planes = np.asarray(orthogonal_planes(jax.random.key(0), 2, head_dim, code_bits))
    assert planes.shape == (2, head_dim, code_bits)
    for head in range(2):
        for start in range(0, code_bits, head_dim):
            block = planes[head, :, start : start + head_dim]
            np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
    assert np.abs(planes[0] - planes[1]).max() > 0.1


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("code_bits", [32, 64, 96])
def test_step_0_of_the_rotation_skip_is_orthogonal_lsh(form, code_bits):
    cfg = NetworkConfig(form=form, skip="rotation", code_bits=code_bits, hidden=20)
    shape = HeadShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=64)
    stacked = init_functions(jax.random.key(3), cfg, shape)
    keys, queries = draw(4, BATCH, LEN, KV_HEADS, 64), draw(5, BATCH, LEN, Q_HEADS, 64)
    for layer in range(LAYERS):
        params = stacked.layer(layer)
        planes = np.asarray(params.weights.keys.rotation)
        for head in range(KV_HEADS):
            for start in range(0, code_bits, 64):
                block = planes[head, :, start : start + 64]
                np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
        hashed, asked = hash_keys(params, keys), hash_queries(params, queries)
        for head in range(KV_HEADS):
            np.testing.assert_allclose(hashed[:, :, head], keys[:, :, head] @ planes[head], atol=1e-5)
        for head in range(Q_HEADS):  # a query is projected on the very planes of its keys, up to its length
            projected = queries[:, :, head] @ planes[head // GROUP]
            ratio = np.asarray(asked[:, :, head]) / projected
            np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=5e-3)
            assert (ratio > 0).all()
    rotations = np.asarray(stacked.weights.keys.rotation)
    assert np.abs(rotations[0] - rotations[1]).max() > 0.1


@pytest.mark.parametrize("form", ["transform", "asymmetric", "symmetric"])
def test_no_two_params_share_memory_which_a_training_step_donates(form):
    leaves = jax.tree.leaves(init_functions(jax.random.key(0), hashing.FORMS[form](form, code_bits=32), SHAPE))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("skip", ["none", "layers"])
def test_the_papers_weights_start_normal_with_deviation_a_thousandth(skip):
    cfg = NetworkConfig(form="symmetric", skip=skip, code_bits=64, hidden=64, code_heads="query")
    net = init_functions(jax.random.key(0), cfg, dataclasses.replace(SHAPE, head_dim=64)).weights.keys
    for kernel in (net.hidden_kernel, net.out_kernel):
        assert kernel.shape == (LAYERS, Q_HEADS, 64, 64)
        assert abs(float(jnp.std(kernel)) - 0.001) < 2e-5
        assert abs(float(jnp.mean(kernel))) < 2e-5
    assert not np.any(net.hidden_bias)
    assert not np.any(net.out_bias)
    assert net.rotation is None


def test_the_residual_form_starts_as_the_sign_of_its_input():
    cfg = FORMS["released"]
    params = init_functions(jax.random.key(0), cfg, SQUARE).layer(0)
    keys = draw_keys(cfg)
    np.testing.assert_allclose(hash_keys(params, keys)[:, :, ::GROUP], keys, atol=0.1)


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
    codes = np.asarray(key_codes(params, keys))
    assert codes.shape == (BATCH, expected.shape[2], cfg.code_bits // 32, 7)
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
    assert set(np.asarray(key_codes(params, draw_keys(cfg))).ravel().tolist()) == {0b100010}
    weights = np.asarray(query_weights(params, draw_queries(cfg)))
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


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].form == "symmetric"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_symmetric_query_weights_are_signs_and_their_sums_over_a_group(form, per_kv_head):
    cfg = FORMS[form]
    if per_kv_head and cfg.code_heads == "query":
        return  # needs one code per KV head
    params, queries = random_params(cfg), draw_queries(cfg)
    expected = np.where(expected_queries(params, queries, cfg) > 0, 1, -1)
    if per_kv_head:
        expected = expected.reshape(BATCH, LEN, KV_HEADS, GROUP, -1).sum(3)
    weights = np.asarray(query_weights(params, queries, per_kv_head))
    assert weights.dtype == np.int32
    np.testing.assert_array_equal(weights, expected[..., None, :])
    limit = GROUP if per_kv_head else 1
    assert params.weight_bounds(GROUP, per_kv_head) == WeightBounds(limit, limit * cfg.code_bits)


@pytest.mark.parametrize("form", ["asymmetric", "asymmetric, not centred"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_asymmetric_query_weights_are_the_query_side_rounded(form, per_kv_head):
    cfg = FORMS[form]
    params, queries = random_params(cfg), draw_queries(cfg)
    outputs = expected_queries(params, queries, cfg)
    if per_kv_head:  # sums come before rounding
        outputs = outputs.reshape(BATCH, LEN, KV_HEADS, GROUP, -1).sum(3)
    sizes = np.abs(outputs)
    scale = np.minimum(127 / sizes.max(-1), (1020 - cfg.code_bits / 2) / sizes.sum(-1))[..., None]
    weights = np.asarray(query_weights(params, queries, per_kv_head))
    assert weights.dtype == np.int32
    assert np.abs(weights - (outputs * scale)[..., None, :]).max() < 0.51
    assert params.weight_bounds(GROUP, per_kv_head) == WeightBounds(127, 1020)


@pytest.mark.parametrize("cfg", [FORMS["asymmetric"], TRANSFORM], ids=lambda cfg: cfg.form)
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_a_query_of_zeros_has_finite_weights(cfg, per_kv_head):
    params = init_functions(jax.random.key(0), cfg, SHAPE).layer(0)
    assert not np.any(query_weights(params, np.zeros_like(draw_queries(cfg)), per_kv_head))


def test_centring_keeps_the_order_of_true_scores():
    """With planes that keep everything (an orthonormal square), centred weights times centred keys rank as q . k."""
    cfg = NetworkConfig(form="asymmetric", code_bits=32, hidden=20)
    shape = dataclasses.replace(SHAPE, head_dim=32, layers=1)
    keys, queries = draw(6, BATCH, 40, KV_HEADS, 32) * 4 + 3, draw(7, BATCH, LEN, Q_HEADS, 32)
    params = init_functions(jax.random.key(0), cfg, shape).layer(0)
    scale = np.exp(draw(8, KV_HEADS, 32))
    params = params.replace(stats=KeyStats(jnp.asarray(draw(9, KV_HEADS, 32)), jnp.asarray(scale)))
    hashed, asked = np.asarray(hash_keys(params, keys)), np.asarray(hash_queries(params, queries))
    for b, t, head in np.ndindex(BATCH, LEN, Q_HEADS):
        true = keys[b, :, head // GROUP].astype(np.float64) @ queries[b, t, head]
        centred = hashed[b, :, head // GROUP] @ asked[b, t, head]
        np.testing.assert_array_equal(np.argsort(true), np.argsort(centred))


def transform_params(seed=1, **fields):
    """One layer of the transform form as after training, with its config."""
    cfg = dataclasses.replace(TRANSFORM, **fields)
    return draw_params(cfg, SHAPE, seed).layer(0), cfg


def numbers_of(bits):
    """The numbers whose digits, the highest first, are the bits of each axis."""
    digits = np.asarray(bits).reshape(*bits.shape[:-1], -1, DIGITS).astype(int)
    return digits @ 2 ** np.arange(DIGITS)[::-1]


def coordinates_of(params, keys):
    """(key - mean) . axis + 1/2 of each bit, [batch, len, kv_heads, code_bits] in float64."""
    mean, axes = (np.asarray(leaf, np.float64) for leaf in (params.stats.mean, params.stats.axes))
    return np.einsum("bskd,kdc->bskc", keys.astype(np.float64) - mean, axes) + 0.5


def test_bits_are_the_binary_digits_of_fixed_point_coordinates():
    params, cfg = transform_params()
    keys = draw_keys(cfg, length=200) * 3  # some beyond both ends
    places = np.asarray(params.stats.levels, np.float64) * coordinates_of(params, keys)
    expected = np.clip(np.floor(places), 0, np.asarray(params.stats.levels) - 1).astype(int) & 1
    is_clear = np.abs(places - np.round(places)) > 1e-4  # float32 may round others to either side
    bits = np.asarray(hash_keys(params, keys)) > 0
    np.testing.assert_array_equal(bits[is_clear], expected[is_clear] == 1)
    assert is_clear.mean() > 0.99 and 0.3 < bits.mean() < 0.7
    assert (places < 0).any() and (places > np.asarray(params.stats.levels)).any()


def test_digits_of_an_axis_together_are_its_cell_from_the_highest_digit_on():
    params, cfg = transform_params()
    keys = draw_keys(cfg, length=200)
    places = 2**DIGITS * coordinates_of(params, keys)[..., ::DIGITS]
    numbers = numbers_of(np.asarray(hash_keys(params, keys)) > 0)
    is_clear = np.abs(places - np.round(places)) > 1e-3
    np.testing.assert_array_equal(numbers[is_clear], np.clip(np.floor(places), 0, 15)[is_clear])


def walk(params, head, axis, steps):
    """Keys along one axis of a KV head whose coordinates there are given."""
    direction = np.asarray(params.stats.axes[head, :, axis * DIGITS], np.float64)
    away = (np.asarray(steps)[:, None] - 0.5) * direction / (direction @ direction)
    keys = np.broadcast_to(np.asarray(params.stats.mean, np.float64), (1, len(steps), KV_HEADS, HEAD_DIM)).copy()
    keys[0, :, head] += away
    return keys.astype(np.float32)


@pytest.mark.parametrize(("head", "axis"), [(0, 0), (1, 7), (2, 15)])
def test_codes_never_fall_along_an_axis_and_take_every_value(head, axis):
    params = transform_params()[0]
    keys = walk(params, head, axis, np.linspace(0.001, 0.999, 97))
    numbers = numbers_of(np.asarray(hash_keys(params, keys)) > 0)[0, :, head, axis]
    assert (np.diff(numbers) >= 0).all()
    assert sorted(set(numbers.tolist())) == list(range(2**DIGITS))


@pytest.mark.parametrize(("head", "axis"), [(0, 3), (1, 0), (2, 9)])
def test_codes_stay_at_the_ends_beyond_them(head, axis):
    params = transform_params()[0]
    keys = walk(params, head, axis, [-1e4, -30, -1.01, -0.01, 1.01, 2.01, 31, 1e4])
    numbers = numbers_of(np.asarray(hash_keys(params, keys)) > 0)[0, :, head, axis]
    assert numbers.tolist() == [0] * 4 + [2**DIGITS - 1] * 4


def test_a_key_between_two_cells_is_in_the_lower_one_by_all_its_digits():
    params = transform_params()[0]
    keys = np.broadcast_to(np.asarray(params.stats.mean), (1, 2, KV_HEADS, HEAD_DIM))  # the middle of every axis
    assert (numbers_of(np.asarray(hash_keys(params, keys)) > 0) == 2 ** (DIGITS - 1) - 1).all()


def test_transform_queries_are_linear_maps_with_a_gain_of_their_head():
    params, cfg = transform_params()
    queries = draw_queries(cfg)
    found = np.asarray(hash_queries(params, queries))
    decode, gains = (
        np.asarray(leaf, np.float64) for leaf in (params.weights.bit_weights, params.weights.log_head_scale)
    )
    for head in range(Q_HEADS):
        expected = np.exp(gains[head]) * (queries[:, :, head].astype(np.float64) @ decode[head // GROUP])
        np.testing.assert_allclose(found[:, :, head], expected, **tolerance("float32"))


@pytest.mark.parametrize("sums", [1, 2])
def test_a_groups_sums_add_up_their_members_at_one_length(sums):
    params, cfg = transform_params(sums=sums)
    members = draw(3, KV_HEADS, sums, GROUP) > 0
    members[:, :, 0] = True
    params = params.replace(stats=dataclasses.replace(params.stats, head_assignment=jnp.asarray(members, jnp.float32)))
    outputs = draw(4, BATCH, LEN, Q_HEADS, cfg.code_bits)
    found = np.asarray(sum_weights(params, outputs, True))
    assert found.shape == (BATCH, LEN, KV_HEADS, sums, cfg.code_bits)
    for head, row in np.ndindex(KV_HEADS, sums):
        own = outputs[:, :, head * GROUP : (head + 1) * GROUP].astype(np.float64)
        expected = own[:, :, members[head, row]].sum(2)
        expected *= transform.SPREAD / np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(found[:, :, head, row], expected, rtol=1e-4, atol=1e-5)


def test_a_query_head_alone_has_one_sum():
    params, cfg = transform_params()
    outputs = draw(4, BATCH, LEN, Q_HEADS, cfg.code_bits)
    found = np.asarray(sum_weights(params, outputs, False))
    expected = outputs * (transform.SPREAD / np.linalg.norm(outputs, axis=-1, keepdims=True))
    np.testing.assert_allclose(found, expected[:, :, :, None], **tolerance("float32"))


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_transform_query_weights_are_their_sums_rounded_on_one_scale(per_kv_head):
    params, cfg = transform_params()
    queries = draw_queries(cfg)
    real = np.asarray(sum_weights(params, hash_queries(params, queries), per_kv_head), np.float64)
    sizes = np.abs(real)
    scale = np.minimum(127 / sizes.max((-2, -1)), (1020 - cfg.code_bits / 2) / sizes.sum(-1).max(-1))
    weights = np.asarray(query_weights(params, queries, per_kv_head))
    assert weights.dtype == np.int32
    assert np.abs(weights - real * scale[..., None, None]).max() < 0.51
    assert params.weight_bounds(GROUP, per_kv_head) == WeightBounds(127, 1020)


@pytest.mark.parametrize("code_bits", [32, 96])
def test_the_transform_form_is_orthogonal_lsh_before_it_is_fitted(code_bits):
    cfg = TransformConfig(code_bits=code_bits)
    params = init_functions(jax.random.key(3), cfg, SHAPE).layer(0)
    planes, keys, queries = np.asarray(params.stats.axes), draw_keys(cfg), draw_queries(cfg)
    for head, start in np.ndindex(KV_HEADS, code_bits // HEAD_DIM):
        block = planes[head, :, start * HEAD_DIM : (start + 1) * HEAD_DIM]
        np.testing.assert_allclose(block.T @ block, np.eye(HEAD_DIM), atol=1e-5)
    projected = np.einsum("bskd,kdc->bskc", keys, planes)
    bits = np.asarray(hash_keys(params, keys)) > 0
    is_clear = np.abs(projected) > 1e-5
    np.testing.assert_array_equal(bits[is_clear], projected[is_clear] > 0)
    asked = np.einsum("bthd,hdc->bthc", queries, np.repeat(planes, GROUP, axis=0))
    np.testing.assert_allclose(hash_queries(params, queries), asked, atol=1e-5)
    np.testing.assert_array_equal(params.stats.head_assignment, np.ones((KV_HEADS, 2, GROUP)))


def test_a_group_of_one_has_one_sum():
    params = init_functions(jax.random.key(0), TRANSFORM, dataclasses.replace(SHAPE, q_heads=KV_HEADS))
    assert params.stats.head_assignment.shape == (LAYERS, KV_HEADS, 1, 1)


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
        ({"form": "asymmetric", "code_bits": 0}, "code_bits is 0"),
        ({"code_bits": 288}, "code_bits is 288"),
        ({"form": "symmetric", "hidden": 0}, "hidden is 0"),
        ({"form": "asymmetric", "code_heads": "query"}, "the asymmetric form .*code-heads kv"),
    ],
)
def test_what_no_hash_function_can_be_built_from_is_named(fields, names):
    with pytest.raises(InputError, match=names):
        hashing.FORMS[fields.get("form", "transform")](**fields)


@pytest.mark.parametrize(("hidden", "code_bits", "head_dim"), [(64, 32, 32), (32, 64, 32), (32, 32, 64)])
def test_identities_between_unequal_widths_are_refused_with_all_three(hidden, code_bits, head_dim):
    cfg = dataclasses.replace(SYMMETRIC, skip="layers", hidden=hidden, code_bits=code_bits)
    shape = dataclasses.replace(SHAPE, head_dim=head_dim)
    with pytest.raises(InputError, match=rf"hidden \({hidden}\), code_bits \({code_bits}\).*head_dim \({head_dim}\)"):
        init_functions(jax.random.key(0), cfg, shape)
