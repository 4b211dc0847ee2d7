"""What is fitted to text: moments beside numpy, digits and axes by their laws, groups that look for two things."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector import fitting, networks
from spotlight_jax.selector.base import HeadShape, Sample
from spotlight_jax.selector.fitting import MOST_DIGITS, allot_digits, fit_axes, measure_moments, merge
from spotlight_jax.selector.forms import init_functions

LAYERS, WINDOWS, KV_LEN, Q_LEN, KV_HEADS, GROUP, HEAD_DIM = 2, 4, 60, 7, 2, 3, 8
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
TRANSFORM, NETWORKS = TransformConfig(code_bits=64), NetworkConfig(form="asymmetric", code_bits=32, hidden=20)

# jitted once: faster than eagerly, and arrays of numpy pass
measure_layers = jax.jit(jax.vmap(measure_moments))
hash_keys = jax.jit(lambda params, x: params.hash_keys(x))
hash_queries = jax.jit(lambda params, x: params.hash_queries(x))
integer_weights = jax.jit(lambda params, x, per_kv_head=False: params.integer_weights(x, per_kv_head), static_argnums=2)


def draw_windows(seed=0, windows=WINDOWS):
    """Keys and queries of windows [windows, layers, len, heads, head_dim], dimensions with spreads of their own."""
    rng = np.random.default_rng(seed)
    spreads = np.geomspace(0.1, 10, HEAD_DIM)
    means = rng.normal(5, 2, (windows, 1, 1, 1, HEAD_DIM))  # windows differ, too
    keys = rng.normal(size=(windows, LAYERS, KV_LEN, KV_HEADS, HEAD_DIM)) * spreads + means
    queries = rng.normal(size=(windows, LAYERS, Q_LEN, Q_HEADS, HEAD_DIM)) * spreads[::-1] ** 0.5
    return keys.astype(np.float32), queries.astype(np.float32)


def moments_of(keys, queries):
    return merge([measure_layers(*window) for window in zip(keys, queries, strict=True)])


def sample_of(moments):
    """A text of which no windows were kept."""
    return Sample(moments, [], SelectionConfig(), 1)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def draw_moment(rng, size=HEAD_DIM):
    """A second moment with directions of its own."""
    root = rng.normal(size=(size, size)) * np.geomspace(0.2, 3, size)
    return root @ root.T


def draw_head(seed, size=HEAD_DIM):
    """Covariance of a KV head's keys, and the second moment of each of its query heads."""
    rng = np.random.default_rng(seed)
    return draw_moment(rng, size), np.stack([draw_moment(rng, size) for _ in range(GROUP)])


def test_moments_of_windows_are_those_of_all_keys_and_queries_together():
    keys, queries = draw_windows()
    found = moments_of(keys, queries)
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        own = keys[:, layer, 1:, head].astype(np.float64).reshape(-1, HEAD_DIM)
        np.testing.assert_allclose(found.mean[layer, head], own.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.covariance[layer, head], np.cov(own.T, bias=True), rtol=1e-4, atol=1e-4)
        asked = queries[:, layer, :, head * GROUP : (head + 1) * GROUP].astype(np.float64).reshape(-1, GROUP, HEAD_DIM)
        for place in range(GROUP):
            second = asked[:, place].T @ asked[:, place] / len(asked)
            np.testing.assert_allclose(found.queries[layer, head, place], second, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.summed[layer, head], (asked.sum(1) ** 2).mean(0), rtol=1e-4)


def test_the_first_key_of_a_window_is_left_out_and_no_other():
    keys, queries = (x[0, 0] for x in draw_windows())
    measure = jax.jit(measure_moments)
    expected, far = measure(keys, queries), keys.copy()
    far[0] = 1e6
    assert_same(measure(far, queries), expected)
    for place in (1, KV_LEN - 1):
        far = keys.copy()
        far[place] = 1e6
        assert np.abs(np.asarray(measure(far, queries).mean)).min() > 1e3


@pytest.mark.parametrize("cuts", [(1,), (3, 4), (1, 2, 5)])
def test_moments_of_chunks_are_those_of_the_whole(cuts):
    keys, queries = (x[0, 0] for x in draw_windows())
    key_parts, query_parts = np.split(keys, [1 + cut for cut in cuts]), np.split(queries, cuts)
    parts = [
        measure_moments(*map(jnp.asarray, part), skip=int(place == 0))
        for place, part in enumerate(zip(key_parts, query_parts, strict=True))
    ]
    whole = measure_moments(jnp.asarray(keys), jnp.asarray(queries))
    for found, expected in zip(jax.tree.leaves(merge(parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_balanced_statistics_centre_keys_and_give_both_sides_equal_spreads():
    keys, queries = draw_windows()
    stats = networks.balance(moments_of(keys, queries))
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        own = keys[:, layer, 1:, head].astype(np.float64).reshape(-1, HEAD_DIM)
        grouped = queries[:, layer].astype(np.float64).reshape(-1, KV_HEADS, GROUP, HEAD_DIM)
        summed = grouped[:, head].sum(1)
        np.testing.assert_allclose(stats.mean[layer, head], own.mean(0), rtol=1e-4)
        scale = np.asarray(stats.scale[layer, head], np.float64)
        centred = (own - own.mean(0)) / scale
        ratio = centred.std(0) / np.sqrt(np.mean((summed * scale) ** 2, axis=0))
        np.testing.assert_allclose(ratio, np.full(HEAD_DIM, ratio[0]), rtol=1e-3)
        np.testing.assert_allclose(np.mean(centred**2), 1.0, rtol=1e-3)


def test_a_dimension_that_never_varies_has_a_finite_scale():
    keys, queries = draw_windows()
    keys[..., 1, 4], queries[..., GROUP:, 3] = 7.0, 0.0
    scale = np.asarray(networks.balance(moments_of(keys, queries)).scale)
    assert np.isfinite(scale).all() and (scale > 0).all()


def test_networks_that_keep_everything_rank_balanced_keys_by_true_scores():
    """With planes that keep everything (four orthonormal bases), hashed queries times hashed keys rank as q . k."""
    keys, queries = draw_windows(2)
    params = init_functions(jax.random.key(0), NETWORKS, SHAPE)
    params = params.fit(sample_of(moments_of(keys, queries)))
    for layer in range(LAYERS):
        own = params.layer(layer)
        hashed = np.asarray(hash_keys(own, keys[:, layer]), np.float64)
        asked = np.asarray(hash_queries(own, queries[:, layer]), np.float64)
        for window, t, head in np.ndindex(WINDOWS, Q_LEN, Q_HEADS):
            true = keys[window, layer, :, head // GROUP].astype(np.float64) @ queries[window, layer, t, head]
            found = hashed[window, :, head // GROUP] @ asked[window, t, head]
            falls = -np.diff(true[np.argsort(found)])
            assert falls.max() < 1e-5 * np.ptp(true)  # float32 may swap those next to equal


@functools.cache
def error_of(levels, step):
    """Mean square error of uniform levels around 0 for a standard normal variable, by a fine sum."""
    grid = np.linspace(-9, 9, 200_001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    places = np.clip(np.floor(grid / step + levels / 2), 0, levels - 1)
    decoded = step * (places + 0.5 - levels / 2)
    return float(np.sum(density * (grid - decoded) ** 2) * (grid[1] - grid[0]))


@pytest.mark.parametrize("digits", range(1, 7))
def test_tabled_steps_and_errors_are_those_of_the_best_uniform_levels(digits):
    levels, step = 2**digits, fitting.step_of(digits)
    best = error_of(levels, step)
    assert fitting._error_of(digits) == pytest.approx(best, rel=3e-3)
    for other in (0.97, 0.99, 1.01, 1.03):
        assert error_of(levels, step * other) > best * (1 - 1e-5)


def test_past_the_tables_end_steps_and_errors_go_on_falling_and_each_digit_gains_less():
    digits = range(12)
    steps, errors = [fitting.step_of(count) for count in digits[1:]], [fitting._error_of(count) for count in digits]
    assert (np.diff(steps) < 0).all() and (np.diff(errors) < 0).all()
    assert (np.diff(errors, 2) > 0).all()  # what makes handing out one after another the best
    for count in (7, 8):
        assert errors[count] == pytest.approx(error_of(2**count, steps[count - 1]), rel=0.1)


def draw_variances(axes):
    return hnp.arrays(np.float64, axes, elements=st.floats(1e-6, 1e6))


@given(draw_variances(HEAD_DIM), st.sampled_from([1, 8, 31, 40]))
def test_all_digits_are_handed_out_and_more_variance_never_gets_fewer(variances, code_bits):
    digits = allot_digits(variances, code_bits)
    assert digits.sum() == code_bits and digits.min() >= 0 and digits.max() <= MOST_DIGITS
    ordered = digits[np.argsort(variances)]
    distinct = np.diff(np.sort(variances)) > 0
    assert (np.diff(ordered)[distinct] >= 0).all()


@given(draw_variances(3), st.integers(1, 8))
def test_no_other_way_of_handing_out_digits_has_a_smaller_error(variances, code_bits):
    errors = [1.0, *(error_of(2**count, fitting.step_of(count)) for count in range(1, MOST_DIGITS + 1))]

    def cost(digits):
        return sum(variance * errors[count] for variance, count in zip(variances, digits, strict=True))

    ways = itertools.product(range(MOST_DIGITS + 1), repeat=3)
    least = min(cost(way) for way in ways if sum(way) == code_bits)
    assert cost(allot_digits(variances, code_bits)) <= least * 1.01  # the table is rounded


def test_an_axis_has_no_more_digits_than_the_most_except_where_axes_are_too_few():
    uneven = np.array([1e9, 1.0, 1.0])
    assert allot_digits(uneven, 12).tolist()[0] == MOST_DIGITS
    assert allot_digits(uneven, 32).tolist() == [11, 11, 10]
    assert allot_digits(np.ones(4), 32).tolist() == [8, 8, 8, 8]


@given(draw_variances(HEAD_DIM), st.sampled_from([2.0**-7, 2.0**5]))
def test_the_unit_of_variance_does_not_matter(variances, unit):
    np.testing.assert_array_equal(allot_digits(variances * unit, 24), allot_digits(variances, 24))


def bits_of(keys, axes, cells):
    """Binary digits of centred keys, by floor."""
    places = np.floor(cells * (keys @ axes + 0.5))
    return np.clip(places, 0, cells - 1).astype(int) & 1


def scores_of(keys, queries, fitted):
    """What queries score keys with the fitted code, up to a constant per query."""
    axes, cells, decode = fitted
    return queries @ decode @ (bits_of(keys, axes, cells) - 0.5).T


def draw_text(seed, covariance, queries):
    """Centred keys, and queries of all heads, with these moments."""
    rng, size = np.random.default_rng(seed), len(covariance)
    keys = rng.normal(size=(2000, size)) @ np.linalg.cholesky(covariance).T
    return keys, np.concatenate([rng.normal(size=(30, size)) @ np.linalg.cholesky(q).T for q in queries])


def correlations(found, true):
    return np.array([np.corrcoef(one, other)[0, 1] for one, other in zip(found, true, strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_with_many_bits_scores_are_the_true_dot_products(seed):
    covariance, moments = draw_head(seed)
    keys, queries = draw_text(seed, covariance, moments)
    true, scores = queries @ keys.T, {}
    for code_bits in (8, 16, 32, 64):
        scores[code_bits] = scores_of(keys, queries, fit_axes(covariance, moments, code_bits))
    spread = [np.mean(1 - correlations(found, true) ** 2) for found in scores.values()]
    assert spread[0] > 3 * spread[1] > 9 * spread[2] > 27 * spread[3]
    assert correlations(scores[64], true).min() > 0.999
    slopes = np.sum(scores[64] * true, axis=1) / np.sum(true * true, axis=1)
    np.testing.assert_allclose(slopes, 1, atol=0.03)  # not only their order


@pytest.mark.parametrize("seed", range(3))
def test_each_doubling_of_the_code_leaves_less_than_half_the_error(seed):
    covariance, moments = draw_head(seed, 32)
    keys, queries = draw_text(seed, covariance, moments)
    true, errors = queries @ keys.T, []
    for code_bits in (32, 64, 128, 256):
        away = scores_of(keys, queries, fit_axes(covariance, moments, code_bits)) - true
        away -= away.mean(1, keepdims=True)
        errors.append(np.mean(np.mean(away**2, axis=1) / np.var(true, axis=1)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3]


def test_turning_keys_and_queries_together_changes_no_score():
    covariance, moments = draw_head(3)
    keys, queries = draw_text(3, covariance, moments)
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(HEAD_DIM, HEAD_DIM)))[0]
    fitted = fit_axes(covariance, moments, 24)
    turned = fit_axes(turn @ covariance @ turn.T, turn @ moments @ turn.T, 24)
    np.testing.assert_array_equal(fitted[1], turned[1])
    found, expected = scores_of(keys @ turn.T, queries @ turn.T, turned), scores_of(keys, queries, fitted)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_scaling_the_queries_of_any_head_changes_nothing():
    covariance, moments = draw_head(5)
    fitted = fit_axes(covariance, moments, 24)
    scaled = fit_axes(covariance, moments * np.array([1e-4, 9.0, 1e4])[:, None, None], 24)
    for one, other in zip(fitted, scaled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_scaling_the_keys_scales_what_bits_are_worth():
    covariance, moments = draw_head(6)
    axes, cells, decode = fit_axes(covariance, moments, 24)
    scaled = fit_axes(9 * covariance, moments, 24)
    for one, other in zip((axes / 3, cells, decode * 3), scaled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_no_digits_go_where_no_query_looks():
    moments = np.stack([np.diag([1.0] * 4 + [1e-9] * 4)] * GROUP)
    axes, _, _ = fit_axes(np.diag([1.0, 2, 3, 4, 100, 100, 100, 100]), moments, 12)
    sizes = np.abs(axes)
    assert (sizes[:4].max(0) > 100 * sizes[4:].max(0)).all()


def test_digits_of_an_axis_are_coarse_to_fine_and_worth_half_of_each_other():
    axes, cells, decode = fit_axes(*draw_head(7), 24)
    starts = np.flatnonzero(cells == 2)
    assert len(starts) > 2
    for start, end in itertools.pairwise([*starts.tolist(), 24]):
        np.testing.assert_array_equal(cells[start:end], 2.0 ** np.arange(1, end - start + 1))
        np.testing.assert_array_equal(axes[:, start:end], np.repeat(axes[:, start : start + 1], end - start, axis=1))
        halves = decode[:, start : start + 1] * 0.5 ** np.arange(end - start)
        np.testing.assert_allclose(decode[:, start:end], halves, rtol=1e-9)


def test_an_axis_of_one_digit_is_decoded_as_the_means_of_a_normal_variables_halves():
    deviations = np.geomspace(2, 2.1, HEAD_DIM)
    _, cells, decode = fit_axes(np.diag(deviations**2), np.stack([np.eye(HEAD_DIM)] * GROUP), HEAD_DIM)
    assert (cells == 2).all()
    np.testing.assert_allclose(np.abs(decode).sum(0), 2 * np.sqrt(2 / np.pi) * deviations, rtol=1e-6)


def test_keys_that_never_vary_and_queries_of_zeros_leave_finite_params():
    covariance, moments = draw_head(8)
    for given_keys, given_queries in ((0 * covariance, moments), (covariance, 0 * moments)):
        for leaf in fit_axes(given_keys, given_queries, 32):
            assert np.isfinite(leaf).all()


def test_fitted_params_score_each_heads_keys_by_their_dot_products():
    keys, queries = draw_windows(1)
    params = init_functions(jax.random.key(0), TRANSFORM, SHAPE).fit(sample_of(moments_of(keys, queries)))
    for layer in range(LAYERS):
        own, seen, asked = params.layer(layer), keys[:, layer, 1:], queries[:, layer]
        bits = np.asarray(hash_keys(own, seen)) > 0
        weights = np.asarray(hash_queries(own, asked))
        for head in range(Q_HEADS):
            found = weights[:, :, head].reshape(-1, 64) @ bits[:, :, head // GROUP].reshape(-1, 64).T
            true = asked[:, :, head].reshape(-1, HEAD_DIM) @ seen[:, :, head // GROUP].reshape(-1, HEAD_DIM).T
            assert correlations(found, true).min() > 0.99


def top_share(params, keys, queries, cfg, count):
    """Share of each head's tokens of highest true dot products that integer scores choose, too."""
    bits = np.asarray(hash_keys(params, keys[None]))[0] > 0
    weights = integer_weights(params, hash_queries(params, queries[None]), False)
    weights, shares = np.asarray(weights, np.int64)[0, :, :, 0], []
    for t, head in np.ndindex(weights.shape[:2]):
        found = np.argsort(-(bits[:, head // GROUP] @ weights[t, head]))[:count]
        true = np.argsort(-(keys[:, head // GROUP].astype(np.float64) @ queries[t, head]))[:count]
        shares.append(len(set(found.tolist()) & set(true.tolist())) / count)
    return np.mean(shares)


def test_integer_scores_of_fitted_params_find_nearly_the_true_top_tokens():
    cfg, shape = TransformConfig(code_bits=128), dataclasses.replace(SHAPE, head_dim=32)
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(LAYERS, KV_HEADS, 32, 32)) * np.geomspace(0.1, 3, 32)
    keys = np.einsum("lskd,lked->lske", rng.normal(size=(LAYERS, 1000, KV_HEADS, 32)), mix) + 4
    keys, queries = keys.astype(np.float32), rng.normal(size=(LAYERS, 30, Q_HEADS, 32)).astype(np.float32)
    start = init_functions(jax.random.key(0), cfg, shape)
    fitted = start.fit(sample_of(measure_layers(keys[:, :500], queries[:, :15])))
    for layer in range(LAYERS):
        unseen = keys[layer, 500:], queries[layer, 15:]
        missed, before = (1 - top_share(params.layer(layer), *unseen, cfg, 50) for params in (fitted, start))
        assert missed < 0.08
        assert before > 4 * missed


def test_the_transform_is_fitted_head_by_head_and_decoded_on_one_scale_for_a_layer():
    moments = moments_of(*draw_windows())
    start = init_functions(jax.random.key(0), TRANSFORM, SHAPE)
    fitted = start.fit(sample_of(moments))
    np.testing.assert_array_equal(fitted.stats.mean, moments.mean)
    np.testing.assert_array_equal(fitted.stats.head_assignment, start.stats.head_assignment)
    np.testing.assert_array_equal(fitted.weights.log_head_scale, start.weights.log_head_scale)
    for layer in range(LAYERS):
        parts = [
            fit_axes(*(np.asarray(leaf[layer, head], np.float64) for leaf in (moments.covariance, moments.queries)), 64)
            for head in range(KV_HEADS)
        ]
        axes, cells, decode = (np.stack(part) for part in zip(*parts, strict=True))
        np.testing.assert_allclose(fitted.stats.axes[layer], axes, rtol=1e-4)
        np.testing.assert_array_equal(fitted.stats.levels[layer], cells)
        decode /= np.sqrt(np.mean(decode**2))  # of the layer: KV heads keep their sizes
        np.testing.assert_allclose(fitted.weights.bit_weights[layer], decode, rtol=1e-4)


def test_fitting_networks_moves_statistics_alone_and_those_not_centred_not_at_all():
    moments = moments_of(*draw_windows())
    start = init_functions(jax.random.key(0), NETWORKS, SHAPE)
    as_they_are = start.replace(cfg=dataclasses.replace(NETWORKS, centre=False))
    for before, stats in ((start, networks.balance(moments)), (as_they_are, start.stats)):
        found = before.fit(sample_of(moments))
        assert_same(found.weights, start.weights)
        assert_same(found.stats, stats)


SELECTION = SelectionConfig(keep=0.1, min_tokens=6)
DIRECTIONS = np.array([[0, 1, 0], [2, 2, 2]])  # by KV head and query head of its group, in layer 0


def draw_planted(seed):
    """Windows of two layers in which heads look along their own direction: one of a group, whose queries are short,
    beside the others, or all alike; the second layer has its KV heads the other way round."""
    rng = np.random.default_rng(seed)
    looks = np.stack([DIRECTIONS, DIRECTIONS[::-1]]).reshape(LAYERS, Q_HEADS)
    keys = rng.normal(size=(LAYERS, KV_LEN, KV_HEADS, HEAD_DIM)) + np.linspace(-4, 4, HEAD_DIM)
    sizes = rng.uniform(6, 12, (LAYERS, Q_LEN, KV_HEADS, 1, 1)) * np.array([1, 0.5, 1]).reshape(1, 1, 1, GROUP, 1)
    along = np.eye(HEAD_DIM)[looks].reshape(LAYERS, 1, KV_HEADS, GROUP, HEAD_DIM)
    queries = (sizes * along).reshape(LAYERS, Q_LEN, Q_HEADS, HEAD_DIM)
    positions = np.broadcast_to(np.linspace(30, KV_LEN - 1, Q_LEN).astype(np.int32), (LAYERS, Q_LEN))
    return keys.astype(np.float32), queries.astype(np.float32), positions.copy()


def split(windows, cfg=TRANSFORM, selection=SELECTION, layers_at_once=1):
    """Hash functions fitted to moments alone, and to windows too."""
    moments = merge([measure_layers(keys, queries) for keys, queries, _ in windows])
    start = init_functions(jax.random.key(0), cfg, SHAPE)
    return start.fit(sample_of(moments)), start.fit(Sample(moments, windows, selection, layers_at_once))


def mass_read(second, layer, head, windows):
    """Attention mass of a group whose heads are shared out so, by sorting, in float64."""
    every = np.concatenate([keys[layer, 1:, head] for keys, _, _ in windows]).astype(np.float64)
    mean, covariance, found = every.mean(0), np.cov(every.T, bias=True), []
    for keys, queries, positions in windows:
        own, asked = keys[layer, :, head].astype(np.float64), queries[layer, :, head * GROUP : (head + 1) * GROUP]
        for query, last in zip(asked.astype(np.float64), positions[layer].tolist(), strict=True):
            sums = [query[np.array(side)].sum(0) for side in (~second, second) if side.any()]
            scores = np.max([(own - mean) @ one / np.sqrt(one @ covariance @ one) for one in sums], axis=0)[:last]
            count = max(last + 1 - int(0.9 * (last + 1)), 6)
            chosen = [last, *np.argsort(-scores)[: count - 1]]
            exps = np.exp(own[: last + 1] @ query.T / np.sqrt(HEAD_DIM))
            found.append(np.mean(exps[chosen].sum(0) / exps.sum(0)))
    return np.mean(found)


def test_a_head_that_looks_for_other_tokens_than_the_rest_gets_a_sum_of_its_own():
    windows = [draw_planted(seed) for seed in range(3)]
    members = np.asarray(split(windows)[1].stats.head_assignment)
    apart = np.array([False, True, False])
    for layer, odd in ((0, 0), (1, 1)):
        assert sorted(members[layer, odd].tolist()) == [[0, 1, 0], [1, 0, 1]]
        assert mass_read(apart, layer, odd, windows) > mass_read(np.zeros(GROUP, bool), layer, odd, windows) + 0.03


@pytest.mark.parametrize("keep", [0.1, 0.7])
def test_heads_that_look_alike_are_all_in_both_sums(keep):
    windows = [draw_planted(seed) for seed in range(3)]
    members = np.asarray(split(windows, selection=dataclasses.replace(SELECTION, keep=keep))[1].stats.head_assignment)
    for layer, alike in ((0, 1), (1, 0)):
        assert members[layer, alike].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_groups_are_shared_out_as_reads_most():
    windows = [draw_planted(seed) for seed in range(3)]
    members = np.asarray(split(windows)[1].stats.head_assignment)
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        ways = np.array(list(itertools.product([False, True], repeat=GROUP)))[: 2 ** (GROUP - 1)]
        found = [mass_read(way, layer, head, windows) for way in ways]
        is_whole = members[layer, head].all()
        chosen = np.zeros(GROUP, bool) if is_whole else members[layer, head, 1] > 0
        assert mass_read(chosen, layer, head, windows) >= max(found) - 1e-5


def test_splitting_moves_members_alone_and_leaves_what_has_no_two_sums():
    windows = [draw_planted(0)]
    start, found = split(windows)
    assert_same(found.weights, start.weights)
    for name in ("mean", "axes", "levels"):
        np.testing.assert_array_equal(getattr(found.stats, name), getattr(start.stats, name))
    for cfg in (dataclasses.replace(TRANSFORM, sums=1), NETWORKS):
        assert_same(*split(windows, cfg))


@pytest.mark.parametrize("at_once", [2, 5])
def test_layers_worked_on_together_change_no_split(at_once):
    windows = [draw_planted(seed) for seed in range(2)]
    alone, together = split(windows)[1], split(windows, layers_at_once=at_once)[1]
    np.testing.assert_array_equal(together.stats.head_assignment, alone.stats.head_assignment)
