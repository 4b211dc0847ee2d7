"""A pass over a sequence with any method, beside plain forward passes and the engine's steps."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.common.flags import ForwardConfig
from eval.methods import METHODS
from eval.methods.window import Window
from eval.model.attend import Selected
from eval.model.scores import Sequence, check_length, score_sequence
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.decode_step import decode_step
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.models.runner import forward, run_layer
from tests.eval.tiny import MODEL, draw_tokens, make_selector, model

TOKENS = draw_tokens(90)
SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,), sink_tokens=1)
ROW = 2 * MODEL.head_dim * 4  # bytes of a key and a value, float32


def run(name, selection=SPARSE, sequence=None, tokens=TOKENS, **fields):
    who = model()
    method = who.open_method(name, selection)
    cfg = ForwardConfig(**fields)
    return score_sequence(who, sequence or Sequence(tokens), method, selection, cfg)


def plain_log_probs(tokens=TOKENS):
    logits = np.asarray(forward(model().params, jnp.asarray(tokens)[None], MODEL)[0, :-1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_dense_equals_a_plain_forward_pass():
    passed, expected = run("dense"), plain_log_probs()
    rows = np.arange(len(TOKENS) - 1)
    np.testing.assert_allclose(passed.log_probs, expected[rows, TOKENS[1:]], atol=1e-4)
    np.testing.assert_array_equal(passed.is_greedy, expected.argmax(-1) == TOKENS[1:])
    np.testing.assert_array_equal(passed.tokens_read, rows_and_last() + 1)
    np.testing.assert_array_equal(passed.bytes_read, (rows_and_last() + 1) * MODEL.layers * MODEL.kv_heads * ROW)


def rows_and_last():
    return np.arange(len(TOKENS))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "magicpig")])
def test_a_full_budget_equals_dense_and_a_small_one_does_not(name):
    dense = run("dense").log_probs
    np.testing.assert_allclose(run(name, dataclasses.replace(SPARSE, keep=1.0)).log_probs, dense, atol=1e-4)
    assert np.abs(run(name).log_probs - dense).max() > 1e-2


def test_magicpig_equals_dense_while_all_tokens_are_sinks_or_recent():
    passed, dense = run("magicpig"), run("dense").log_probs
    np.testing.assert_allclose(passed.log_probs[:60], dense[:60], atol=1e-4)
    assert np.abs(passed.log_probs[75:] - dense[75:]).max() > 1e-3


def test_a_dense_prefix_is_dense_and_what_follows_is_not():
    dense = run("dense").log_probs
    passed = run("window", dense_prefix=50)
    np.testing.assert_allclose(passed.log_probs[:50], dense[:50], atol=1e-4)
    assert np.abs(passed.log_probs[50:] - dense[50:]).max() > 1e-3
    np.testing.assert_array_equal(passed.tokens_read[:50], np.arange(1, 51))


def test_the_papers_rule_gives_every_query_the_whole_lengths_budget():
    passed = run("oracle-scores", whole_length=True)
    np.testing.assert_array_equal(passed.tokens_read, np.minimum(np.arange(1, 91), 18))  # 90 - int(0.8 * 90)
    np.testing.assert_allclose(passed.log_probs[:18], run("dense").log_probs[:18], atol=1e-4)


def test_reads_are_summed_over_dense_and_sparse_layers():
    passed = run("spotlight")
    length = np.arange(1, 91)
    budgets = np.maximum(length - (length * 800_000 // 1_000_000), np.minimum(length, 5))
    np.testing.assert_allclose(passed.tokens_read, budgets, rtol=1e-6)
    index = 2 * length * MODEL.kv_heads * 4  # two sparse layers, 32 bits a KV head
    np.testing.assert_array_equal(passed.index_bytes, index)
    expected = (length + 2 * budgets) * MODEL.kv_heads * ROW + index
    np.testing.assert_array_equal(passed.bytes_read, expected)


def test_methods_that_share_a_sequence_share_its_dense_layers_and_nothing_else():
    sequence = Sequence(TOKENS)
    alone = {name: run(name).log_probs for name in ("oracle-scores", "quest", "dense")}
    for name in ("dense", "quest", "oracle-scores", "quest"):
        np.testing.assert_array_equal(run(name, sequence=sequence).log_probs, alone[name])
    assert set(sequence.streams) == {1, 2}  # quest reads two layers densely


def test_chunks_of_queries_and_of_logits_change_nothing():
    tokens = draw_tokens(400)
    whole = run("oracle-scores", tokens=tokens).log_probs
    np.testing.assert_allclose(run("oracle-scores", tokens=tokens, scores_mib=1).log_probs, whole, atol=1e-5)


@flax.struct.dataclass
class Counted(Window):
    """Says how often it is traced."""

    def scores(self, queries, keys, index, positions):
        TRACES.append(self.name)
        return Window.scores(self, queries, keys, index, positions)


TRACES = []


def test_one_compiled_layer_serves_all_layers_and_shares():
    who = model()
    window = who.open_method("window", SPARSE)
    method = Counted("counted", window.selection, window.dense_layers)
    for keep in (0.1, 0.2, 0.5):
        selection = dataclasses.replace(SPARSE, keep=keep)
        score_sequence(who, Sequence(TOKENS), method, selection)
    assert len(TRACES) == 1


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_spotlight_selects_what_the_engines_steps_select(per):
    """Log-probabilities of a teacher-forced pass equal those of one decoding step after another."""
    selection = dataclasses.replace(SPARSE, per=per, recent_tokens=2)
    passed = run("spotlight", selection, tokens=TOKENS[:60])
    engine = Engine(MODEL, model().params, make_selector(), DecodeConfig(selection=selection))
    cache = engine.empty_cache(1, 256)
    step = jax.jit(decode_step, static_argnums=(5, 6, 7))
    for place in range(59):
        args = (
            engine.params,
            engine.selectors(np.zeros(1, int)),
            cache,
            jnp.asarray(TOKENS[place : place + 1]),
            jnp.full((1,), 256),
        )
        logits, cache = step(*args, MODEL, engine.cfg, "sparse")
        cache = cache.replace(lengths=cache.lengths + 1)
        found = jax.nn.log_softmax(logits[0])[TOKENS[place + 1]]
        np.testing.assert_allclose(found, passed.log_probs[place], atol=1e-3)


@pytest.mark.parametrize(("length", "message"), [(1, "at least 2"), (513, "context of 512")])
def test_lengths_that_cannot_be_passed_are_told(length, message):
    with pytest.raises(InputError, match=message):
        check_length(length, MODEL)


@pytest.mark.parametrize("fields", [{"dense_prefix": -1}, {"scores_mib": 0}])
def test_bad_flags_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ForwardConfig(**fields)


@pytest.mark.parametrize("name", ["spotlight", "quest", "magicpig", "random"])
def test_a_layer_lowers_for_cuda(name):
    who = model()
    positions, lengths = jnp.arange(40, dtype=jnp.int32)[None], jnp.full((1,), 40, jnp.int32)
    method = who.open_method(name, SPARSE).layer(1)
    attend = Selected(method, jnp.zeros(40, jnp.int32), positions, lengths, jnp.int32(0), 16)
    args = [who.params["layer_1"], jnp.zeros((1, 40, MODEL.embed)), positions, attend]
    leaves, structure = jax.tree.flatten(args)  # tracing describes a tree's leaves by objects that are no arrays
    layer = jax.jit(lambda *leaves: run_layer(*jax.tree.unflatten(structure, leaves), MODEL))
    layer.trace(*leaves).lower(lowering_platforms=("cuda",))


def test_a_method_that_reads_every_layer_densely_is_refused():
    with pytest.raises(InputError, match="'window' reads all 3 layers of this model densely"):
        model().open_method("window", dataclasses.replace(SPARSE, dense_layers=(0, 1, 2)))


def test_a_model_of_nan_is_an_error_and_no_perplexity():
    who = model()
    norm = jax.tree.map(lambda leaf: leaf * np.nan, who.params["norm"])
    method = who.open_method("dense", SPARSE)
    with pytest.raises(InputError, match=r"log-probabilities are not finite"):
        broken = dataclasses.replace(who, params={**who.params, "norm": norm})
        score_sequence(broken, Sequence(TOKENS), method, SPARSE)
