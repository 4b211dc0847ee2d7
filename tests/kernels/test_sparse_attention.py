"""sparse_attention: softmax over selected rows only."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.sparse_attention import sparse_attention
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
