"""sparse_attention: softmax over selected rows only."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.sparse_attention import estimated_attention, pallas_triton, sparse_attention
from spotlight_jax.kernels.sparse_attention.config import Config
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    estimated_attention_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.moments import BLOCK, empty_moments, fold
from spotlight_jax.tail import init_tail

BATCH, MAX_LEN, KV_HEADS, GROUP, HEAD_DIM, BUDGET = 2, 48, 3, 2, 8, 5
Q_HEADS = KV_HEADS * GROUP
folded = jax.jit(fold, static_argnums=5)


def draw_inputs(rng, heads, batch=BATCH, max_len=MAX_LEN, kv_heads=KV_HEADS, group=GROUP, head_dim=HEAD_DIM, n=BUDGET):
    queries = rng.standard_normal((batch, kv_heads * group, head_dim)).astype(np.float32)
    keys = rng.standard_normal((batch, max_len, kv_heads, head_dim)).astype(np.float32)
    values = rng.standard_normal((batch, max_len, kv_heads, head_dim)).astype(np.float32)
    indices = np.stack([rng.permutation(max_len)[:n] for _ in range(batch * heads)]).reshape(batch, heads, n)
    is_real = rng.random((batch, heads, n)) < 0.7
    is_real[..., 0] = True
    return queries, keys, values, np.where(is_real, indices, 0).astype(np.int32), is_real


def rows_read(indices, is_real, shape):
    """Return whether a cache row of a KV head is selected: bool [batch, max_len, kv_heads]."""
    is_read = np.zeros(shape[:3], bool)
    for sequence, row in np.ndindex(indices.shape[:2]):
        kv_head = row * shape[2] // indices.shape[1]
        is_read[sequence, indices[sequence, row][is_real[sequence, row]], kv_head] = True
    return is_read


def attend_by_numpy(queries, keys, values, indices, is_real):
    """One head and one row at a time in float64."""
    out = np.zeros(queries.shape)
    for sequence, head in np.ndindex(queries.shape[:2]):
        kv_head = head // (queries.shape[1] // keys.shape[2])
        row = head // (queries.shape[1] // indices.shape[1])
        chosen = indices[sequence, row][is_real[sequence, row]]
        scores = keys[sequence, chosen, kv_head].astype(np.float64) @ queries[sequence, head].astype(np.float64)
        shares = np.exp((scores - scores.max()) / np.sqrt(queries.shape[2]))
        out[sequence, head] = shares / shares.sum() @ values[sequence, chosen, kv_head].astype(np.float64)
    return out


IMPLEMENTATIONS = {
    "reference": jax.jit(functools.partial(sparse_attention, impl="reference")),
    "gather": jax.jit(functools.partial(sparse_attention, impl="gather")),
    "pallas_triton": jax.jit(functools.partial(sparse_attention_pallas_triton, interpret=True)),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("group, per_head", [(2, False), (2, True), (5, False), (5, True)])
@pytest.mark.parametrize("shape", [{}, {"max_len": 300, "n": 150, "head_dim": 80}], ids=["small", "large"])
def test_every_implementation_equals_numpy(impl, group, per_head, shape):
    heads = KV_HEADS * group if per_head else KV_HEADS
    inputs = draw_inputs(np.random.default_rng(0), heads, group=group, **shape)
    out = IMPLEMENTATIONS[impl](*map(jnp.asarray, inputs))
    np.testing.assert_allclose(out, attend_by_numpy(*inputs), rtol=1e-5, atol=1e-5)


def test_a_budget_of_one_returns_the_planted_value():
    queries, keys, values, _, _ = draw_inputs(np.random.default_rng(1), KV_HEADS)
    indices = np.arange(BATCH * KV_HEADS, dtype=np.int32).reshape(BATCH, KV_HEADS, 1)
    out = sparse_attention(*map(jnp.asarray, (queries, keys, values, indices, np.ones_like(indices, bool))))
    for sequence, head in np.ndindex(BATCH, Q_HEADS):
        planted = values[sequence, indices[sequence, head // GROUP, 0], head // GROUP]
        np.testing.assert_allclose(out[sequence, head], planted, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_were_not_selected_never_reach_the_output(impl):
    queries, keys, values, indices, is_real = draw_inputs(np.random.default_rng(2), KV_HEADS)
    is_read = rows_read(indices, is_real, keys.shape)
    indices = np.where(is_real, indices, indices[..., :1])
    clean = IMPLEMENTATIONS[impl](*map(jnp.asarray, (queries, keys, values, indices, is_real)))
    keys[~is_read], values[~is_read] = np.nan, np.nan
    poisoned = IMPLEMENTATIONS[impl](*map(jnp.asarray, (queries, keys, values, indices, is_real)))
    np.testing.assert_array_equal(clean, poisoned)


def test_a_selection_of_another_number_of_heads_is_refused():
    queries, keys, values, _, _ = map(jnp.asarray, draw_inputs(np.random.default_rng(4), KV_HEADS))
    selection = jnp.zeros((BATCH, 2, 4), jnp.int32), jnp.ones((BATCH, 2, 4), bool)
    with pytest.raises(InputError, match="per KV head"):
        sparse_attention(queries, keys, values, *selection)
    moments, params = empty_moments(BATCH, KV_HEADS, HEAD_DIM, np.dtype("float32")), init_tail(1, Q_HEADS)
    with pytest.raises(InputError, match="per KV head"):
        estimated_attention(queries, keys, values, *selection, jnp.full((BATCH,), MAX_LEN), moments, params)


ESTIMATES = {
    "reference": functools.partial(estimated_attention, impl="reference"),
    "gather": functools.partial(estimated_attention, impl="gather"),
    "pallas_triton": functools.partial(estimated_attention_pallas_triton, interpret=True),
}


def estimate_by_numpy(query, keys, values, read, end, params):
    """Return one query head's output and the share that is estimated, in float64 from all logits.

    Args:
        read: positions that were selected, and the newest.
        params: `TailParams` of the head.
    """
    logits = keys @ query / np.sqrt(len(query))
    start = (end - 1) // BLOCK * BLOCK
    unread = np.setdiff1d(np.arange(1, start), read)
    x, y = logits[1:start], values[1:start]
    weights = np.exp(logits[read])
    if not len(unread) or params.gate == 0:
        return weights @ values[read] / weights.sum(), 0.0
    normal, m, v, n = scipy.stats.norm, logits[unread].mean(), logits[unread].var(), len(unread)
    quantile = normal.ppf(np.clip(n / (start - 1), 0.5, 1 - 1e-5))
    past = quantile - 2
    a = quantile + params.cut[0] + past * params.cut[1]
    h = normal.pdf(a) / normal.cdf(a)
    s = np.sqrt(v / max(1 - a * h - h * h, 0.05))
    c = m + s * h
    log_mass = np.log(n) + c + s * s / 2 + normal.logcdf(a - s) - normal.logcdf(a)
    log_mass += params.log_mass[0] + past * params.log_mass[1] + params.spread * np.sqrt(v)
    mass = np.exp(min(log_mass, np.log(n) + logits[read].max()))
    shift = c + s * s - s * normal.pdf(a - s) / normal.cdf(a - s) - m
    covariance = ((x - x.mean())[:, None] * (y - y.mean(axis=0))).mean(axis=0)
    slope = (m - x.mean() + shift * (params.slope[0] + past * params.slope[1])) / x.var()
    value = y.mean(axis=0) + covariance * slope
    total = weights.sum() + mass
    return (weights @ values[read] + mass * value) / total, mass / total


def draw_params(rng, rows):
    """Corrections of each query head, of which one has no tail."""
    start = init_tail(rows, Q_HEADS)
    drawn = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), start)
    return drawn.replace(gate=start.gate.at[-1, 1].set(0.0))


@pytest.mark.parametrize("impl", ESTIMATES)
@pytest.mark.parametrize("heads", [KV_HEADS, Q_HEADS], ids=["per KV head", "per query head"])
@pytest.mark.parametrize("dtype, atol", [("float32", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("lengths, head_dim", [((48, 30), 8), ((400, 321), 80)], ids=["few blocks", "many blocks"])
def test_the_estimate_is_numpys_for_every_implementation(impl, heads, dtype, atol, lengths, head_dim, monkeypatch):
    """Corrections of both sequences alike or of each; a row is two programs; rows that nobody reads are poisoned."""
    monkeypatch.setattr(pallas_triton, "config_here", lambda _: Config(programs=2 * BATCH * heads))
    rng = np.random.default_rng(0)
    *arrays, indices, is_real = draw_inputs(rng, heads, max_len=max(lengths), n=max(lengths) // 5, head_dim=head_dim)
    arrays, ends = [jnp.asarray(one, dtype) for one in arrays], jnp.asarray(lengths, jnp.int32)
    is_real &= indices < np.asarray(lengths)[:, None, None]
    params = draw_params(rng, BATCH if dtype == "float32" else 1)
    moments = folded(
        empty_moments(BATCH, KV_HEADS, head_dim, arrays[1].dtype),
        *arrays[1:],
        jnp.zeros_like(ends),
        ends - 1,
        max(lengths),
    )
    outs, shares = jax.jit(ESTIMATES[impl])(*arrays, indices, is_real, ends, moments, params)
    queries, keys, values = (np.asarray(one.astype(jnp.float32), np.float64) for one in arrays)
    for b, h in np.ndindex(BATCH, Q_HEADS):
        kv, row, end = h // GROUP, h // (Q_HEADS // heads), lengths[b]
        newest = np.arange((end - 1) // BLOCK * BLOCK, end)
        read = np.union1d(indices[b, row][is_real[b, row]], newest)
        own = types.SimpleNamespace(
            **{name: np.asarray(leaf[min(b, len(leaf) - 1), h], np.float64) for name, leaf in vars(params).items()}
        )
        out, share = estimate_by_numpy(queries[b, h], keys[b, :, kv], values[b, :, kv], read, end, own)
        np.testing.assert_allclose(shares[b, h], share, atol=atol)
        np.testing.assert_allclose(outs[b, h].astype(jnp.float32), out, atol=atol)
    assert np.asarray(shares).max() > 0.1 or max(lengths) < BLOCK


@pytest.mark.parametrize("impl", ["gather", "pallas_triton"])
def test_an_estimate_reads_what_was_selected_and_the_newest_alone(impl):
    rng = np.random.default_rng(3)
    queries, keys, values, indices, is_real = draw_inputs(rng, KV_HEADS, max_len=300, n=20)
    ends = np.asarray([300, 200], np.int32)
    is_real &= indices < ends[:, None, None]
    moments = folded(
        empty_moments(BATCH, KV_HEADS, HEAD_DIM, np.dtype("float32")),
        *map(jnp.asarray, (keys, values, 0 * ends, ends - 1)),
        300,
    )
    params = draw_params(rng, 1)
    run = jax.jit(ESTIMATES[impl])
    clean = run(queries, keys, values, indices, is_real, ends, moments, params)
    is_read = rows_read(indices, is_real, keys.shape)
    for row, end in enumerate(ends):
        is_read[row, (end - 1) // BLOCK * BLOCK : end] = True
    keys[~is_read], values[~is_read] = np.nan, np.nan
    indices = np.where(is_real, indices, 299)
    poisoned = run(queries, keys, values, indices, is_real, ends, moments, params)
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(one, other)
