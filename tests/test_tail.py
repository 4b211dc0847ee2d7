"""The tail: moments, the estimate, and its laws against NumPy and against what it is an estimate of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spotlight_jax import moments as kept
from spotlight_jax import tail
from spotlight_jax.moments import BLOCK, Moments, empty_moments, with_newest

BATCH, KV_HEADS, GROUP, DIM = 2, 3, 2, 8
add_tokens, fold = jax.jit(kept.add_tokens), jax.jit(kept.fold, static_argnames="tokens")
estimate, query_moments = jax.jit(tail.estimate), jax.jit(tail.query_moments)


def draw(seed: int, length: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values; keys and values have means far from zero."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    queries = jax.random.normal(a, (BATCH, KV_HEADS, GROUP, DIM)) * scale
    keys = jax.random.normal(b, (BATCH, length, KV_HEADS, DIM)) * scale + 3.0
    return queries, keys, jax.random.normal(c, (BATCH, length, KV_HEADS, DIM)) - 1.0


def start(q_heads: int, kv_heads: int = KV_HEADS) -> tail.Corrections:
    """Corrections that change nothing."""
    return jax.tree.map(lambda leaf: leaf[0], tail.init_tail(1, q_heads)).grouped(kv_heads)


def all_moments(keys: jax.Array, values: jax.Array, ends: np.ndarray) -> Moments:
    """Of whole sequences in one call."""
    positions = jnp.arange(keys.shape[1])[None]
    is_counted = (positions > 0) & (positions < jnp.asarray(ends)[:, None])
    return add_tokens(empty_moments(len(keys), KV_HEADS, DIM, np.dtype("float32")), keys, values, is_counted)


def test_moments_are_numpys():
    _, keys, values = draw(0, 50)
    found = all_moments(keys, values, np.array([50, 31]))
    for row, end in enumerate((50, 31)):
        k, v = (np.asarray(x[row, 1:end], np.float64) for x in (keys, values))
        assert found.count[row] == end - 1
        np.testing.assert_allclose(found.key[row], k.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.value[row], v.mean(axis=0), rtol=1e-5)
        for head in range(KV_HEADS):
            off_k, off_v = k[:, head] - k[:, head].mean(axis=0), v[:, head] - v[:, head].mean(axis=0)
            np.testing.assert_allclose(found.scatter[row, head, :DIM], off_k.T @ off_k, atol=1e-3)
            np.testing.assert_allclose(found.scatter[row, head, DIM:], off_v.T @ off_k, atol=1e-3)


@pytest.mark.parametrize("pieces", [(300,), (1,) * 300, (20, 280), (63, 1, 1, 128, 107), (64, 64, 172)])
def test_moments_by_chunks_and_steps_are_those_of_all_full_blocks(pieces):
    """Sequences of 300 and 131 tokens, of which the second is padding after those."""
    _, keys, values = draw(1, 300)
    ends, start = jnp.asarray([300, 131], jnp.int32), 0
    moments = empty_moments(BATCH, KV_HEADS, DIM, np.dtype("float32"))
    for size in pieces:
        starts = jnp.minimum(start, ends)
        moments = fold(moments, keys, values, starts, jnp.minimum(start + size, ends), tokens=size)
        start += size
    expected = all_moments(keys, values, np.asarray(ends) // BLOCK * BLOCK)
    for one, other in zip(jax.tree.leaves(moments), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("end", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_every_token_is_in_the_moments_or_newest_but_the_first(end):
    """Whatever the length: no token is estimated that is read for being new, and none is forgotten."""
    positions = jnp.full((1, 1), end - 1, jnp.int32)
    newest = np.flatnonzero(with_newest(jnp.zeros((1, 1, 1, end + 5), bool), positions)[0, 0, 0])
    moments = fold(
        empty_moments(1, 1, 2, np.dtype("float32")),
        *[jnp.ones((1, end + 5, 1, 2))] * 2,
        *jnp.asarray([[0], [end - 1]], jnp.int32),
        tokens=end,
    )
    assert newest.tolist() == list(range(max(int(moments.count[0]) + 1, 1) if moments.count[0] else 0, end))


def moments_by_numpy(queries, keys, values, is_in):
    """Mean and variance of the logits of some tokens, the mean of their values, and the covariance, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    logits = np.einsum("bkgd,bskd->bkgs", q, k) / np.sqrt(DIM)
    counted = np.broadcast_to(is_in[:, :, None], logits.shape).copy()
    counted[..., 0] = False
    weights = counted / counted.sum(axis=-1, keepdims=True)
    mean = (weights * logits).sum(axis=-1)
    off = (logits - mean[..., None]) * weights
    value = np.einsum("bkgs,bskd->bkgd", weights, v)
    return mean, (off * (logits - mean[..., None])).sum(-1), value, np.einsum("bkgs,bskd->bkgd", off, v)


def unread_by_moments(queries, keys, values, is_read):
    """What a decoding step knows: moments of all, and of what is left when what it read is taken off."""
    length = keys.shape[1]
    queries, keys, values = map(jnp.asarray, (queries, keys, values))
    whole, of_values = query_moments(all_moments(keys, values, np.full((len(keys),), length)), queries)
    logits = jnp.einsum("bkgd,bskd->bkgs", queries, keys) * DIM**-0.5
    off = logits - whole.mean[..., None]
    took = jnp.asarray(is_read).at[..., 0].set(False)[:, :, None].astype(jnp.float32)
    sums = jnp.broadcast_to(took.sum(-1), whole.count.shape), (off * took).sum(-1), (off**2 * took).sum(-1)
    return whole, tail.take_off(whole, *sums), of_values


def test_moments_of_logits_and_what_is_left_of_them_are_numpys():
    queries, keys, values = draw(2, 64)
    is_read = np.random.default_rng(0).random((BATCH, KV_HEADS, 64)) < 0.2
    whole, unread, of_values = unread_by_moments(queries, keys, values, is_read)
    mean, variance, value, covariance = moments_by_numpy(queries, keys, values, np.ones_like(is_read))
    np.testing.assert_allclose(whole.mean, mean, atol=1e-4)
    np.testing.assert_allclose(whole.variance, variance, atol=1e-4)
    np.testing.assert_allclose(of_values.mean, value, atol=1e-4)
    np.testing.assert_allclose(of_values.covariance, covariance, atol=1e-4)
    mean, variance, *_ = moments_by_numpy(queries, keys, values, ~is_read)
    np.testing.assert_allclose(unread.mean, mean, atol=1e-4)
    np.testing.assert_allclose(unread.variance, variance, atol=1e-4)


def test_the_estimate_is_the_modules_formula_in_numpy():
    rows = (BATCH, KV_HEADS, GROUP)
    rng = np.random.default_rng(1)

    def draw_moments(count):
        mean, variance = jnp.asarray(rng.normal(size=rows)), jnp.asarray(rng.uniform(0.1, 4, rows))
        return tail.LogitMoments(jnp.full(rows, count), mean.astype(jnp.float32), variance.astype(jnp.float32))

    whole, unread = draw_moments(100.0), draw_moments(90.0)
    values = tail.ValueMoments(*(jnp.asarray(rng.normal(size=(*rows, DIM)), jnp.float32) for _ in range(2)))
    log_mass, value = estimate(whole, unread, values, jnp.full(rows, 1e3), start(6))
    normal, m, v = scipy.stats.norm, np.asarray(unread.mean, np.float64), np.asarray(unread.variance, np.float64)
    a = normal.ppf(0.9)
    h = normal.pdf(a) / normal.cdf(a)
    s = np.sqrt(v / (1 - a * h - h * h))
    c = m + s * h
    expected = np.log(90 * np.exp(c + s * s / 2) * normal.cdf(a - s) / normal.cdf(a))
    np.testing.assert_allclose(log_mass, expected, rtol=1e-3, atol=1e-3)
    tilted = c + s * s - s * normal.pdf(a - s) / normal.cdf(a - s)
    slope = (tilted - np.asarray(whole.mean)) / np.asarray(whole.variance)
    expected = np.asarray(values.mean) + np.asarray(values.covariance) * slope[..., None]
    np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-3)


def test_jointly_normal_keys_and_values_are_estimated_right():
    """Logits that are normal and values that go with the keys linearly: mass and value tend to the truth."""
    length, dim = 60_000, 8
    rng = np.random.default_rng(2)
    keys = rng.normal(size=(1, length, 1, dim)) @ rng.normal(size=(dim, dim)) * 0.5 + 1.0
    values = keys @ rng.normal(size=(dim, dim)) * 0.3 + rng.normal(size=(1, length, 1, dim))
    queries = rng.normal(size=(1, 1, 1, dim))
    logits = np.einsum("d,sd->s", queries[0, 0, 0], keys[0, :, 0]) / np.sqrt(dim)
    is_read = logits >= np.quantile(logits[1:], 0.98)
    took, whole = is_read[1:], slice(1, None)
    moments = add_tokens(
        empty_moments(1, 1, dim, np.dtype("float32")), *(jnp.asarray(x, jnp.float32) for x in (keys, values)),
        jnp.asarray(np.arange(length) > 0)[None],
    )  # fmt: skip
    known, of_values = query_moments(moments, jnp.asarray(queries, jnp.float32))
    x = logits[whole] - float(known.mean[0, 0, 0])
    sums = (jnp.full((1, 1, 1), one, jnp.float32) for one in (took.sum(), x[took].sum(), (x[took] ** 2).sum()))
    unread = tail.take_off(known, *sums)
    log_mass, value = estimate(known, unread, of_values, jnp.full((1, 1, 1), logits.max()), start(1, 1))
    weights = np.exp(logits[whole][~took])
    assert abs(float(log_mass[0, 0, 0]) - np.log(weights.sum())) < 0.02
    truth = (weights[:, None] * values[0, whole, 0][~took]).sum(axis=0) / weights.sum()
    scatter = values[0, whole, 0][~took].std(axis=0)
    assert np.abs((np.asarray(value[0, 0, 0]) - truth) / scatter).max() < 0.03


def test_with_nothing_unread_or_a_closed_gate_the_output_is_what_was_read():
    rows = (BATCH, KV_HEADS, GROUP)
    params = start(6)
    read = jnp.asarray(np.random.default_rng(3).normal(size=(*rows, DIM)), jnp.float32)
    vector, one = jnp.full((*rows, DIM), 5.0), jnp.full(rows, 1.0)
    for count, chosen in ((0.0, params), (40.0, params._replace(gate=params.gate * 0))):
        whole, unread = (tail.LogitMoments(jnp.full(rows, each), one, one) for each in (50.0, count))
        log_mass, value = estimate(whole, unread, tail.ValueMoments(vector, vector), one, chosen)
        out, share = tail.join(read, one, value, log_mass)
        np.testing.assert_array_equal(out, read)
        assert not share.any()


@pytest.mark.parametrize("x", [-30.0, -8.0, -3.0, -0.5, 0.0, 0.5, 3.0, 8.0])
def test_the_normal_distributions_functions_are_scipys(x):
    normal = scipy.stats.norm
    log_cdf, hazard = tail._log_cdf_and_hazard(jnp.float32(x))
    np.testing.assert_allclose(log_cdf, normal.logcdf(x), rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(hazard, np.exp(normal.logpdf(x) - normal.logcdf(x)), rtol=1e-5)
    share = min(normal.cdf(-abs(x)), 0.5)
    if share > 1e-6:
        assert abs(float(tail._upper_quantile(jnp.float32(share))) - abs(x)) < 5e-4


@jax.jit
def respond(queries, keys, is_read, highest):
    """Output, share and log mass for keys that are their own values; one program for all examples."""
    whole, unread, values = unread_by_moments(queries, keys, keys, is_read)
    log_mass, value = estimate(whole, unread, values, highest, start(KV_HEADS * GROUP))
    return *tail.join(jnp.ones(value.shape), highest, value, log_mass), log_mass


def test_ten_thousand_hostile_inputs_stay_finite():
    """Huge and tiny numbers, constant keys, one key a thousand times the others, nothing read, all but one, all."""
    count, length, rng = 10_000, 40, np.random.default_rng(0)
    key_scale, query_scale = (
        rng.choice([0.0, 1e-20, 1e-3, 1.0, 30.0, 1e4, 1e15], count)[:, None, None, None] for _ in range(2)
    )
    keys = rng.normal(size=(count, length, KV_HEADS, DIM)) * key_scale
    is_constant, has_outlier = (rng.random(count) < 0.2 for _ in range(2))
    keys[is_constant] = keys[is_constant, :1]
    keys[has_outlier, length // 2] *= 1000.0
    queries = rng.normal(size=(count, KV_HEADS, GROUP, DIM)) * query_scale
    shares = rng.choice([0.0, 0.03, 0.5, 0.97, 1.0], (count, 1, 1))
    is_read = rng.random((count, KV_HEADS, length)) < shares
    highest = np.broadcast_to(np.minimum(key_scale * query_scale, 1e30)[..., 0], (count, KV_HEADS, GROUP))
    found = respond(*(np.asarray(x, np.float32) for x in (queries, keys)), is_read, np.float32(highest))
    assert all(np.isfinite(array).all() for array in found)
    shares_estimated = np.asarray(found[1])
    assert (shares_estimated >= 0).all() and (shares_estimated <= 1).all()
    assert 0.1 < (shares_estimated > 0).mean() < 0.95  # both kinds occur
