"""sparse_attention: softmax over selected rows only."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.sparse_attention import pallas_triton, read_selected, sparse_attention
from spotlight_jax.kernels.sparse_attention.config import Config
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    read_selected_pallas_triton,
    sparse_attention_pallas_triton,
)

BATCH, MAX_LEN, KV_HEADS, GROUP, HEAD_DIM, BUDGET = 2, 48, 3, 2, 8, 5
Q_HEADS = KV_HEADS * GROUP


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
    "reference": functools.partial(sparse_attention, impl="reference"),
    "gather": functools.partial(sparse_attention, impl="gather"),
    "pallas_triton": functools.partial(sparse_attention_pallas_triton, interpret=True),
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
    with pytest.raises(InputError, match="per KV head"):
        read_selected(queries, keys, values, *selection, queries[..., 0], values[:, 0])


READS = {
    "reference": functools.partial(read_selected, impl="reference"),
    "gather": functools.partial(read_selected, impl="gather"),
    "pallas_triton": functools.partial(read_selected_pallas_triton, interpret=True),
}


def read_by_numpy(queries, keys, values, indices, is_real, mean_logits, mean_values):
    """Return the fields of `Reads` for one query head, and how much of one rounding of all factors is in its sums."""
    at = indices[is_real]
    logits = keys[at] @ queries / np.sqrt(len(queries))
    shares = np.exp(logits) / np.exp(logits).sum()
    x, y = (logits - mean_logits)[at > 0], (values[at] - mean_values)[at > 0]
    reads = {
        "out": shares @ values[at], "log_sum": np.log(np.exp(logits).sum()), "highest": logits.max(),
        "count": len(x), "logits": x.sum(), "squares": x @ x, "values": y.sum(axis=0), "products": x @ y,
    }  # fmt: skip
    return reads, {"out": shares @ np.abs(values[at]), "products": 2.01 * np.abs(x) @ np.abs(y)}


@pytest.mark.parametrize("impl", READS)
@pytest.mark.parametrize("heads", [KV_HEADS, Q_HEADS], ids=["per KV head", "per query head"])
@pytest.mark.parametrize("dtype, rounding", [("float32", 0), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("shape", [{}, {"max_len": 300, "n": 150, "head_dim": 80}], ids=["small", "large"])
def test_reads_are_numpys_sums_over_the_selected_rows(impl, heads, dtype, rounding, shape, monkeypatch):
    """Position 0 is read but not summed. A large row is two programs of three tiles, of which the last is empty."""
    monkeypatch.setattr(pallas_triton, "config_here", lambda _: Config(programs=2 * BATCH * heads))
    rng = np.random.default_rng(0)
    *arrays, indices, is_real = draw_inputs(rng, heads, **shape)
    is_real &= indices > 0
    indices[..., 0], is_real[..., 0] = 0, True
    for cached in arrays[1:]:
        cached[~rows_read(indices, is_real, cached.shape)] = np.nan
    means = (rng.standard_normal(size) for size in ((BATCH, Q_HEADS), (BATCH, KV_HEADS, arrays[0].shape[2])))
    arrays, means = [jnp.asarray(one, dtype) for one in arrays], [jnp.asarray(one, jnp.float32) for one in means]
    found = READS[impl](*arrays, jnp.asarray(indices), jnp.asarray(is_real), *means)
    queries, keys, values, mean_logits, mean_values = (np.asarray(one, np.float64) for one in (*arrays, *means))
    for b, h in np.ndindex(BATCH, Q_HEADS):
        kv, row = h // GROUP, h // (Q_HEADS // heads)
        expected, rounded = read_by_numpy(
            queries[b, h], keys[b, :, kv], values[b, :, kv], indices[b, row], is_real[b, row],
            mean_logits[b, h], mean_values[b, kv],
        )  # fmt: skip
        for name, sums in expected.items():
            bound = 2e-5 * len(indices[b, row]) ** 0.5 + rounding * rounded.get(name, 0)
            error = np.abs(np.asarray(getattr(found, name)[b, h]) - sums)
            assert (error <= bound + 1e-5 * np.abs(sums)).all(), (name, error.max())
