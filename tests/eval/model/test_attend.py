"""Attention of what a method chose, beside NumPy, and what it says of its reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.methods.base import Method, Selection
from eval.methods.opening import open_method
from eval.model.attend import Selected, causal_budgets, default_chunk
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector.base import HeadShape
from tests.tolerances import tolerance

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

BATCH, LENGTH, KV_HEADS, GROUP, HEAD_DIM = 2, 37, 2, 3, 8
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=1, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
LENGTHS = np.full((BATCH,), LENGTH, np.int32)


class Given(Method):
    """Reads what it was made with."""

    def select(self, queries, keys, index, positions, budgets):
        mask, weights = self.params
        rows = jnp.arange(BATCH)[:, None]
        return Selection(
            mask=mask[rows, positions],
            index_bytes=positions.astype(jnp.float32),
            log_weights=None if weights is None else weights[rows, positions],
        )


jax.tree_util.register_pytree_node(
    Given, lambda m: ((m.params,), (m.name, m.selection, m.dense_layers)), lambda aux, leaves: Given(*aux, *leaves)
)


@functools.partial(jax.jit, static_argnames="chunk")
def attend(method, queries, keys, values, *args, chunk=64):
    return Selected(method, *args, chunk=chunk)(queries, keys, values)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(BATCH, LENGTH, Q_HEADS, HEAD_DIM)).astype(np.float32) * 2
    keys, values = rng.normal(size=(2, BATCH, LENGTH, KV_HEADS, HEAD_DIM)).astype(np.float32)
    return queries, keys, values


def draw_mask(heads, seed=1):
    rng = np.random.default_rng(seed)
    mask = rng.random((BATCH, LENGTH, heads, LENGTH)) < 0.3
    causal = np.arange(LENGTH)[None, :] <= np.arange(LENGTH)[:, None]
    return (mask | np.eye(LENGTH, dtype=bool)[:, None]) & causal[:, None]


def attention_by_hand(queries, keys, values, mask, weights):
    out = np.zeros(queries.shape)
    for b, t, h in np.ndindex(BATCH, LENGTH, Q_HEADS):
        row = mask[b, t, h * mask.shape[2] // Q_HEADS]
        logits = keys[b, :, h // GROUP].astype(np.float64) @ queries[b, t, h] / np.sqrt(HEAD_DIM)
        if weights is not None:
            logits = logits + weights[b, t, h * mask.shape[2] // Q_HEADS]
        shares = np.where(row, np.exp(logits - logits[row].max()), 0)
        out[b, t, h] = shares / shares.sum() @ values[b, :, h // GROUP]
    return out


@pytest.mark.parametrize("heads", [KV_HEADS, Q_HEADS])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_it_is_the_weighted_softmax_over_what_was_chosen(heads, is_weighted):
    queries, keys, values = draw()
    mask = draw_mask(heads)
    weights = np.random.default_rng(2).normal(size=mask.shape).astype(np.float32) if is_weighted else None
    method = Given("given", SelectionConfig(), (), (mask, weights))
    budgets = np.zeros(LENGTH, np.int32)
    out, traffic = attend(method, queries, keys, values, budgets, POSITIONS, LENGTHS, chunk=8)
    expected = attention_by_hand(queries, keys, values, mask, weights)
    np.testing.assert_allclose(out, expected, **tolerance("float32"))
    counts = mask.sum(-1)
    np.testing.assert_allclose(traffic.tokens, counts.mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(traffic.bytes, counts.sum(-1) * 2 * HEAD_DIM * 4)  # a key and a value, float32
    np.testing.assert_array_equal(traffic.index_bytes, POSITIONS)


def test_queries_of_a_dense_prefix_read_everything_without_weights():
    queries, keys, values = draw()
    mask = draw_mask(Q_HEADS)
    weights = np.ones(mask.shape, np.float32) * mask.cumsum(-1)
    method = Given("given", SelectionConfig(), (), (mask, weights))
    budgets = np.zeros(LENGTH, np.int32)
    out, traffic = attend(method, queries, keys, values, budgets, POSITIONS, LENGTHS, np.int32(10), chunk=8)
    causal = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool))[:, None], mask.shape)
    mask[:, :10], weights[:, :10] = causal[:, :10], 0
    expected = attention_by_hand(queries, keys, values, mask, weights)
    np.testing.assert_allclose(out, expected, **tolerance("float32"))
    np.testing.assert_array_equal(traffic.tokens[:, :10], POSITIONS[:, :10] + 1)
    np.testing.assert_array_equal(traffic.bytes[:, :10], (POSITIONS[:, :10] + 1) * KV_HEADS * 2 * HEAD_DIM * 4)
    assert not np.asarray(traffic.index_bytes)[:, :10].any()


@pytest.mark.parametrize("name", ["oracle-scores", "quest", "magicpig", "lsh-centred", "window"])
def test_one_query_over_a_cache_reads_as_the_last_of_many(name):
    """A decoding step, whose cache has unfilled slots that hold anything, beside teacher forcing."""
    method = open_method(name, None, SelectionConfig(), SHAPE).layer(0)
    queries, keys, values = draw()
    budgets = np.asarray(causal_budgets(LENGTH, SelectionConfig(keep=0.2, min_tokens=4)))
    forced, _ = attend(method, queries, keys, values, budgets, POSITIONS, LENGTHS, chunk=8)
    empty = np.full((BATCH, 11, KV_HEADS, HEAD_DIM), 1e3, np.float32)
    cached = [np.concatenate([x, empty], axis=1) for x in (keys, values)]
    budgets = np.pad(budgets, (0, 11))
    step, _ = attend(method, queries[:, -1:], *cached, budgets, POSITIONS[:, -1:], LENGTHS)
    np.testing.assert_allclose(step, forced[:, -1:], **tolerance("float32"))


def test_budgets_come_from_each_prefix_or_from_the_whole():
    cfg = SelectionConfig(keep=0.1, min_tokens=3)
    expected = [max(n - int(0.9 * n + 1e-9), min(3, n)) for n in range(1, 101)]
    assert causal_budgets(100, cfg).tolist() == expected
    assert causal_budgets(100, cfg, whole_length=True).tolist() == [min(n, 10) for n in range(1, 101)]
    fixed = SelectionConfig(budget=7)
    assert causal_budgets(100, fixed).tolist() == [min(n, 7) for n in range(1, 101)]


def test_a_chunk_holds_the_scores_that_fit():
    assert default_chunk(9, 8192, 64) == 64 * 2**20 // (4 * 9 * 8192)
    assert default_chunk(1, 16, 64) == 512
    assert default_chunk(32, 2**20, 1) == 8
