"""sparse_attention: softmax over selected rows only."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.sparse_attention import read_selected, sparse_attention
from spotlight_jax.kernels.sparse_attention.pallas_triton import sparse_attention_pallas_triton

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
    is_read = np.zeros((BATCH, MAX_LEN, KV_HEADS), bool)
    for sequence, head in np.ndindex(BATCH, KV_HEADS):
        is_read[sequence, indices[sequence, head][is_real[sequence, head]], head] = True
        indices[sequence, head][~is_real[sequence, head]] = indices[sequence, head, 0]
    clean = IMPLEMENTATIONS[impl](*map(jnp.asarray, (queries, keys, values, indices, is_real)))
    keys[~is_read], values[~is_read] = np.nan, np.nan
    poisoned = IMPLEMENTATIONS[impl](*map(jnp.asarray, (queries, keys, values, indices, is_real)))
    np.testing.assert_array_equal(clean, poisoned)


def test_a_selection_of_another_number_of_heads_is_refused():
    queries, keys, values, _, _ = map(jnp.asarray, draw_inputs(np.random.default_rng(4), KV_HEADS))
    with pytest.raises(InputError, match="per KV head"):
        sparse_attention(queries, keys, values, jnp.zeros((BATCH, 2, 4), jnp.int32), jnp.ones((BATCH, 2, 4), bool))


@pytest.mark.parametrize("heads", [2, 6])
def test_reads_are_numpys_sums_over_the_selected_rows(heads):
    """Both implementations, for one selection a KV head and one a query head; position 0 is read but not summed."""
    batch, q_heads, kv_heads, head_dim, kv_len, budget = 2, 6, 2, 8, 40, 7
    rng = np.random.default_rng(0)
    queries, keys, values = (
        rng.normal(size=(batch, *shape, head_dim)).astype(np.float32)
        for shape in ((q_heads,), (kv_len, kv_heads), (kv_len, kv_heads))
    )
    indices = np.argsort(rng.random((batch, heads, kv_len)), axis=-1)[..., :budget].astype(np.int32)
    indices[..., 0] = 0
    indices[..., 1:] = np.where(indices[..., 1:] == 0, 39, indices[..., 1:])
    is_real = np.arange(budget) < np.array([budget, 4])[:, None, None]
    is_real = np.broadcast_to(is_real, indices.shape)
    means = rng.normal(size=(batch, q_heads)).astype(np.float32), rng.normal(size=(batch, kv_heads, head_dim))
    found = {
        impl: read_selected(
            *map(jnp.asarray, (queries, keys, values, indices, is_real)), *map(jnp.float32, means), impl
        )
        for impl in ("reference", "gather")
    }
    for b in range(batch):
        for h in range(q_heads):
            kv, row = h // (q_heads // kv_heads), h // (q_heads // heads)
            at = indices[b, row][is_real[b, row]]
            logits = keys[b, at, kv] @ queries[b, h] / np.sqrt(head_dim)
            weights = np.exp(logits)
            x, y = (logits - means[0][b, h])[at > 0], (values[b, at, kv] - means[1][b, kv])[at > 0]
            expected = {
                "out": weights @ values[b, at, kv] / weights.sum(), "log_sum": np.log(weights.sum()),
                "highest": logits.max(), "count": len(x), "logits": x.sum(), "squares": (x * x).sum(),
                "values": y.sum(axis=0), "products": x @ y,
            }  # fmt: skip
            for impl, reads in found.items():
                for name, value in expected.items():
                    np.testing.assert_allclose(
                        getattr(reads, name)[b, h], value, rtol=2e-4, atol=2e-4, err_msg=f"{impl} {name}"
                    )
