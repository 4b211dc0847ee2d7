"""The tail: moments, the estimate, and its laws against NumPy and against what it is an estimate of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlight_jax import tail

BATCH, KV_HEADS, GROUP, DIM = 2, 3, 2, 8

add_tokens, logit_moments = jax.jit(tail.add_tokens), jax.jit(tail.logit_moments)
take_off, estimate = jax.jit(tail.take_off), jax.jit(tail.estimate)


def draw(seed: int, length: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values; keys and values have means far from zero."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    queries = jax.random.normal(a, (BATCH, KV_HEADS, GROUP, DIM)) * scale
    keys = jax.random.normal(b, (BATCH, length, KV_HEADS, DIM)) * scale + 3.0
    return queries, keys, jax.random.normal(c, (BATCH, length, KV_HEADS, DIM)) - 1.0


def all_moments(keys: jax.Array, values: jax.Array, ends: np.ndarray) -> tail.Moments:
    """Of whole sequences in one call."""
    places = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape[:2])
    return add_tokens(
        tail.empty_moments(BATCH, KV_HEADS, DIM), keys, values, tail.counted(places, jnp.asarray(ends, jnp.int32))
    )


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
            np.testing.assert_allclose(found.key_key[row, head], off_k.T @ off_k, atol=1e-3)
            np.testing.assert_allclose(found.value_key[row, head], off_v.T @ off_k, atol=1e-3)


@pytest.mark.parametrize("pieces", [(50,), (1,) * 50, (20, 30), (7, 1, 1, 41)])
def test_moments_by_chunks_and_steps_are_those_of_the_whole(pieces):
    _, keys, values = draw(1, 50)
    ends, start = jnp.asarray([50, 31], jnp.int32), 0
    moments = tail.empty_moments(BATCH, KV_HEADS, DIM)
    for size in pieces:
        places = jnp.broadcast_to(jnp.arange(start, start + size, dtype=jnp.int32), (BATCH, size))
        piece = slice(start, start + size)
        moments = add_tokens(moments, keys[:, piece], values[:, piece], tail.counted(places, ends))
        start += size
    for found, expected in zip(jax.tree.leaves(moments), jax.tree.leaves(all_moments(keys, values, ends)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


def unread_by_numpy(queries, keys, values, is_read):
    """Logits of all tokens, and the moments of those unread, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    logits = np.einsum("bkgd,bskd->bkgs", q, k) / np.sqrt(DIM)
    unread = ~is_read
    unread[..., 0] = False
    weights = unread[:, :, None] / unread[:, :, None].sum(axis=-1, keepdims=True)
    mean = (weights * logits).sum(axis=-1)
    off = (logits - mean[..., None]) * weights
    value = np.einsum("bkgs,bskd->bkgd", np.broadcast_to(weights, logits.shape), v)
    return logits, mean, (off * (logits - mean[..., None])).sum(-1), value, np.einsum("bkgs,bskd->bkgd", off, v)


def unread_by_moments(queries, keys, values, is_read):
    """The same by what a decoding step knows: moments of all, and sums over what it read."""
    length = keys.shape[1]
    queries, keys, values = map(jnp.asarray, (queries, keys, values))
    whole = logit_moments(all_moments(keys, values, np.full((BATCH,), length)), queries)
    logits = jnp.einsum("bkgd,bskd->bkgs", queries, keys) * DIM**-0.5
    off = logits - whole.mean[..., None]
    took = jnp.asarray(is_read).at[..., 0].set(False)[:, :, None].astype(jnp.float32)
    values_off = values[:, :, :, None] - whole.value[:, None]  # [b, s, k, g, d]
    sums = (
        jnp.broadcast_to(took.sum(-1), whole.count.shape), (off * took).sum(-1), (off**2 * took).sum(-1),
        jnp.einsum("bkgs,bskgd->bkgd", jnp.broadcast_to(took, off.shape), values_off),
        jnp.einsum("bkgs,bskgd->bkgd", off * took, values_off),
    )  # fmt: skip
    return take_off(whole, *sums)


def test_what_is_left_when_tokens_are_taken_off_are_the_moments_of_the_rest():
    queries, keys, values = draw(2, 64)
    is_read = np.random.default_rng(0).random((BATCH, KV_HEADS, 64)) < 0.2
    _, mean, variance, value, covariance = unread_by_numpy(queries, keys, values, is_read)
    found = unread_by_moments(queries, keys, values, is_read)
    np.testing.assert_allclose(found.mean, mean, atol=1e-4)
    np.testing.assert_allclose(found.variance, variance, atol=1e-4)
    np.testing.assert_allclose(found.value, value, atol=1e-4)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-4)


def test_the_estimate_is_the_modules_formula_in_numpy():
    rows = (BATCH, KV_HEADS, GROUP)
    rng = np.random.default_rng(1)
    unread = tail.UnreadMoments(
        jnp.full(rows, 90.0), jnp.asarray(rng.normal(size=rows), jnp.float32),
        jnp.asarray(rng.uniform(0.1, 4, rows), jnp.float32),
        *(jnp.asarray(rng.normal(size=(*rows, DIM)), jnp.float32) for _ in range(2)),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: leaf[0], tail.init_tail(1, 6))
    log_mass, value = estimate(unread, jnp.full(rows, 100.0), jnp.full(rows, 1e3), params)
    normal, m, v = scipy.stats.norm, np.asarray(unread.mean, np.float64), np.asarray(unread.variance, np.float64)
    a = normal.ppf(0.9)
    h = normal.pdf(a) / normal.cdf(a)
    s = np.sqrt(v / (1 - a * h - h * h))
    c = m + s * h
    np.testing.assert_allclose(log_mass, np.log(90 * np.exp(c + s * s / 2) * normal.cdf(a - s) / normal.cdf(a)), 1e-4)
    shift = c + s * s - s * normal.pdf(a - s) / normal.cdf(a - s) - m
    expected = np.asarray(unread.value) + np.asarray(unread.covariance) * (shift / v)[..., None]
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)


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
        tail.empty_moments(1, 1, dim), *(jnp.asarray(x, jnp.float32) for x in (keys, values)),
        jnp.asarray(np.arange(length) > 0)[None],
    )  # fmt: skip
    known = logit_moments(moments, jnp.asarray(queries, jnp.float32))
    x, y = logits[whole] - float(known.mean[0, 0, 0]), values[0, whole, 0] - np.asarray(known.value[0, 0, 0])
    sums = (took.sum(), x[took].sum(), (x[took] ** 2).sum(), y[took].sum(0), (x[took, None] * y[took]).sum(0))
    unread = take_off(known, *(jnp.asarray(s, jnp.float32)[None, None, None] for s in sums))
    params = jax.tree.map(lambda leaf: leaf[0], tail.init_tail(1, 1))
    log_mass, value = estimate(unread, known.count, jnp.full((1, 1, 1), logits.max()), params)
    weights = np.exp(logits[whole][~took])
    assert abs(float(log_mass[0, 0, 0]) - np.log(weights.sum())) < 0.02
    truth = (weights[:, None] * values[0, whole, 0][~took]).sum(axis=0) / weights.sum()
    scatter = values[0, whole, 0][~took].std(axis=0)
    assert np.abs((np.asarray(value[0, 0, 0]) - truth) / scatter).max() < 0.03


def test_with_nothing_unread_or_a_closed_gate_the_output_is_what_was_read():
    rows = (BATCH, KV_HEADS, GROUP)
    params = jax.tree.map(lambda leaf: leaf[0], tail.init_tail(1, 6))
    read = jnp.asarray(np.random.default_rng(3).normal(size=(*rows, DIM)), jnp.float32)
    vector, one = jnp.full((*rows, DIM), 5.0), jnp.full(rows, 1.0)
    for count, chosen in ((0.0, params), (40.0, params.replace(gate=params.gate * 0))):
        unread = tail.UnreadMoments(jnp.full(rows, count), one, one, vector, vector)
        log_mass, value = estimate(unread, jnp.full(rows, 50.0), one, chosen)
        out, share = tail.join(read, one, value, log_mass)
        np.testing.assert_array_equal(out, read)
        assert not share.any()


@jax.jit
def respond(queries, keys, is_read, highest):
    """Output, share and log mass for keys that are their own values; one program for all examples."""
    unread = unread_by_moments(queries, keys, keys, is_read)
    params = jax.tree.map(lambda leaf: leaf[0], tail.init_tail(1, KV_HEADS * GROUP))
    log_mass, value = estimate(unread, jnp.full(highest.shape, keys.shape[1] - 1.0), highest, params)
    return *tail.join(jnp.ones(value.shape), highest, value, log_mass), log_mass


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 30.0, 1e4, 1e15]),
    st.sampled_from([0.0, 1e-20, 1.0, 1e4, 1e15]),
    st.booleans(),
)
def test_hostile_numbers_stay_finite(seed, key_scale, query_scale, is_constant):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(BATCH, 40, KV_HEADS, DIM)) * key_scale
    keys = np.broadcast_to(keys[:, :1], keys.shape) if is_constant else keys
    queries = rng.normal(size=(BATCH, KV_HEADS, GROUP, DIM)) * query_scale
    is_read = rng.random((BATCH, KV_HEADS, 40)) < rng.random()
    highest = np.full((BATCH, KV_HEADS, GROUP), min(key_scale * query_scale, 1e30))
    found = respond(*(np.asarray(x, np.float32) for x in (queries, keys)), is_read, np.float32(highest))
    assert all(np.isfinite(array).all() for array in found)
