"""Metrics of a selection beside counts and numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax import metrics
from tests.tolerances import tolerance

BATCH, Q_LEN, KV_HEADS, GROUP, HEAD_DIM, KV_LEN = 2, 4, 3, 2, 8, 11
Q_HEADS = KV_HEADS * GROUP

probabilities_of = jax.jit(metrics.attention_probabilities, static_argnums=3)
quality_of = jax.jit(metrics.selection_quality)


def draw(seed):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(BATCH, Q_LEN, Q_HEADS, HEAD_DIM)).astype(np.float32) * 2
    keys = rng.normal(size=(BATCH, KV_LEN, KV_HEADS, HEAD_DIM)).astype(np.float32)
    positions = rng.integers(0, KV_LEN, (BATCH, Q_LEN)).astype(np.int32)
    return queries, keys, positions


def expected_probabilities(queries, keys, positions):
    """Softmax over the keys each query sees, loop by loop."""
    out = np.zeros((BATCH, Q_LEN, Q_HEADS, KV_LEN))
    for b, t, head in np.ndindex(out.shape[:3]):
        seen = positions[b, t] + 1
        logits = keys[b, :seen, head // GROUP].astype(np.float64) @ queries[b, t, head] / np.sqrt(HEAD_DIM)
        out[b, t, head, :seen] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return out


@pytest.mark.parametrize("heads", [Q_HEADS, KV_HEADS])
def test_probabilities_are_the_softmax_over_visible_keys_and_the_mean_over_a_group(heads):
    inputs = draw(0)
    expected = expected_probabilities(*inputs)
    if heads == KV_HEADS:
        expected = np.stack([expected[:, :, k * GROUP : (k + 1) * GROUP].mean(2) for k in range(KV_HEADS)], 2)
    np.testing.assert_allclose(probabilities_of(*inputs, heads), expected, **tolerance("float32"))


@given(st.integers(0, 2**16))
def test_probabilities_sum_to_1_and_are_0_past_the_query(seed):
    inputs = draw(seed)
    for heads in (Q_HEADS, KV_HEADS):
        found = np.asarray(probabilities_of(*inputs, heads))
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        unseen = np.arange(KV_LEN) > inputs[2][:, :, None, None]
        assert not np.where(unseen, found, 0).any()


def test_bfloat16_inputs_give_float32_probabilities():
    queries, keys, positions = draw(1)
    found = probabilities_of(queries.astype(jnp.bfloat16), keys.astype(jnp.bfloat16), positions, Q_HEADS)
    assert found.dtype == jnp.float32


def test_a_selection_counted_by_hand():
    chosen, oracle = np.zeros((2, 1, 2, 6), bool), np.zeros((2, 1, 2, 6), bool)
    weights = np.zeros((2, 1, 2, 6), np.float32)
    weights[...] = [0.4, 0.3, 0.1, 0.1, 0.1, 0.0]
    # head 0: {0, 2, 3} beside {0, 1}: 1 in common of 4; then {1} beside {1}
    chosen[0, 0, 0, [0, 2, 3]], oracle[0, 0, 0, [0, 1]] = True, True
    chosen[1, 0, 0, [1]], oracle[1, 0, 0, [1]] = True, True
    # head 1: nothing in common; then nothing chosen
    chosen[0, 0, 1, [4, 5]], oracle[0, 0, 1, [0, 1, 2]] = True, True
    oracle[1, 0, 1, [0]] = True
    found = quality_of(chosen, oracle, weights)
    np.testing.assert_allclose(found.iou, [(1 / 4 + 1) / 2, 0], rtol=1e-6)
    np.testing.assert_allclose(found.recall, [(1 / 2 + 1) / 2, 0], rtol=1e-6)
    np.testing.assert_allclose(found.mass, [(0.6 + 0.3) / 2, (0.1 + 0) / 2], rtol=1e-6)
    np.testing.assert_allclose(found.oracle_mass, [(0.7 + 0.3) / 2, (0.8 + 0.4) / 2], rtol=1e-6)


@given(st.integers(0, 2**16))
def test_quality_is_that_of_python_sets(seed):
    rng = np.random.default_rng(seed)
    shape = (BATCH, Q_LEN, KV_HEADS, KV_LEN)
    chosen, oracle = rng.random(shape) < rng.random(), rng.random(shape) < rng.random()
    weights = rng.dirichlet(np.ones(KV_LEN), shape[:3]).astype(np.float32)
    found = quality_of(chosen, oracle, weights)
    for head in range(KV_HEADS):
        iou, recall, mass, best = [], [], [], []
        for b, t in np.ndindex(BATCH, Q_LEN):
            mine = set(np.flatnonzero(chosen[b, t, head]).tolist())
            wanted = set(np.flatnonzero(oracle[b, t, head]).tolist())
            iou.append(len(mine & wanted) / max(len(mine | wanted), 1))
            recall.append(len(mine & wanted) / max(len(wanted), 1))
            mass.append(sum(float(weights[b, t, head, s]) for s in mine))
            best.append(sum(float(weights[b, t, head, s]) for s in wanted))
        for values, name in ((iou, "iou"), (recall, "recall"), (mass, "mass"), (best, "oracle_mass")):
            np.testing.assert_allclose(getattr(found, name)[head], np.mean(values), **tolerance("float32"))


def test_the_oracle_beside_itself_is_perfect():
    weights = np.random.default_rng(0).dirichlet(np.ones(KV_LEN), (BATCH, Q_LEN, KV_HEADS)).astype(np.float32)
    oracle = weights >= np.sort(weights, -1)[..., -3:-2]
    found = quality_of(oracle, oracle, weights)
    np.testing.assert_array_equal(found.iou, np.ones(KV_HEADS))
    np.testing.assert_array_equal(found.recall, np.ones(KV_HEADS))
    np.testing.assert_array_equal(found.mass, found.oracle_mass)


def test_positions_are_spread_over_the_window_to_its_end():
    np.testing.assert_array_equal(metrics.spread_positions(12, 4), [2, 5, 8, 11])
    np.testing.assert_array_equal(metrics.spread_positions(5, 5), [0, 1, 2, 3, 4])
    assert metrics.spread_positions(8192, 256)[-1] == 8191 and len(set(metrics.spread_positions(8192, 256))) == 256
