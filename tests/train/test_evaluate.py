import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.config.hashing import NetworkConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from train.capture import Captured
from train.config import EvaluationConfig
from train.evaluate import evaluate, mean_over_sparse

LAYERS, KV_LEN, KV_HEADS, GROUP, HEAD_DIM = 2, 60, 2, 3, 8


def _captured(seed):
    rng = np.random.default_rng(seed)
    return Captured(
        queries=jnp.asarray(rng.standard_normal((LAYERS, 4, KV_HEADS * GROUP, HEAD_DIM)), jnp.float32),
        picks=jnp.tile(jnp.asarray([[29, 41, 50, 59]], jnp.int32), (LAYERS, 1)),
        keys=jnp.asarray(rng.standard_normal((LAYERS, KV_LEN, KV_HEADS, HEAD_DIM)), jnp.float32),
    )


def _top(scores, count):
    """The query's own token and the highest scores, the newest first among equals."""
    own = len(scores) - 1
    return {
        own,
        *(s for _, s in sorted(((score, s) for s, score in enumerate(scores[:own])), reverse=True)[: count - 1]),
    }


def _probabilities(keys, query):
    weights = np.exp(keys @ query / np.sqrt(HEAD_DIM))
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("per", "oracle"), [("kv_head", "scores"), ("kv_head", "probabilities"), ("query_head", "probabilities")]
)
def test_quality_equals_a_count_by_hand(per, oracle):
    cfg = NetworkConfig(form="symmetric", code_bits=32, hidden=4, centre=False)
    params = init_functions(jax.random.key(0), cfg, HeadShape(LAYERS, KV_HEADS * GROUP, KV_HEADS, HEAD_DIM))
    measured = EvaluationConfig(keep=0.5, per=per, oracle=oracle)
    windows = [_captured(1), _captured(2)]
    got = evaluate(params, windows, measured, layers_at_once=1)
    planes = np.asarray(params.weights.keys.rotation)  # at its start the hash function is this rotation alone
    heads = KV_HEADS if per == "kv_head" else KV_HEADS * GROUP
    iou, mass, best = np.zeros((3, LAYERS, heads))
    for seen in windows:
        for layer in range(LAYERS):
            for head in range(heads):
                members = range(head * GROUP, (head + 1) * GROUP) if per == "kv_head" else [head]
                kv_head = members[0] // GROUP
                keys = np.asarray(seen.keys[layer, :, kv_head])
                bits = keys @ planes[layer, kv_head] > 0
                for row, last in enumerate(np.asarray(seen.picks[layer])):
                    queries = np.asarray(seen.queries[layer, row, list(members)])
                    matches = sum((bits == (query @ planes[layer, kv_head] > 0)).sum(-1) for query in queries)
                    shares = [_probabilities(keys[: last + 1], query) for query in queries]
                    exact = sum(shares) if oracle == "probabilities" else sum(keys @ query for query in queries)
                    count = last + 1 - int(0.5 * (last + 1))
                    count = max(count, 20)
                    chosen, best_set = _top(matches[: last + 1], count), _top(exact[: last + 1], count)
                    iou[layer, head] += len(chosen & best_set) / len(chosen | best_set) / 8
                    mean_share = sum(shares) / len(queries) / 8
                    mass[layer, head] += mean_share[list(chosen)].sum()
                    best[layer, head] += mean_share[list(best_set)].sum()
    np.testing.assert_allclose(got.iou, iou, atol=1e-5)
    np.testing.assert_allclose(got.mass, mass, atol=1e-5)
    np.testing.assert_allclose(got.oracle_mass, best, atol=1e-5)


def test_means_leave_out_dense_layers():
    values = np.asarray([[9.0, 9.0], [1.0, 3.0], [2.0, 4.0]])
    assert mean_over_sparse(values, (0,)) == 2.5
    assert mean_over_sparse(values, (0, 1)) == 3.0


def test_evaluations_that_never_happen_are_refused():
    with pytest.raises(InputError, match="evaluate every 0 steps"):
        EvaluationConfig(every=0)
