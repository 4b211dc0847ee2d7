"""What evaluations of long sequences take, by the compiled programs of SmolLM2-135M's shapes: nothing is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.inspect import run as inspect
from eval.methods.opening import open_method
from eval.model import scores
from eval.model.attend import Continued, Prefill, Selected, default_chunk
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params, unembed_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import Dense, run_layer
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.forms import init_functions
from tests.eval.tiny import draw_tokens, model

LONGEST = 131_072
MIB, GIB = 2**20, 2**30
SCORES_MIB = 256  # a GPU's, see `default_chunk`
CFG = dataclasses.replace(PRESETS["smollm2-135m"], max_len=LONGEST)
PARAMS = jax.eval_shape(lambda: init_params(jax.random.key(0), CFG, jnp.float32))
LAYER = PARAMS["layer_0"]
QUERIES = 256


def shape_of(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def ints(*sizes):
    return shape_of(*sizes, dtype=jnp.int32)


def stream(length):
    return shape_of(1, length, CFG.embed)


def temporary(lowered):
    """Bytes beside the inputs and outputs of a compiled program."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def open_layer(name):
    hash_cfg, shape = TransformConfig(), head_shape(CFG)
    selector = Selector(shape, init_functions(jax.random.key(0), hash_cfg, shape), "x", {})
    return open_method(name, selector, SelectionConfig(keep=0.02), shape).layer(0)


def bytes_to_inspect(name, length):
    chunk = 32
    assert chunk <= default_chunk(CFG.q_heads, length, SCORES_MIB)
    keys = shape_of(1, length, CFG.kv_heads, CFG.head_dim)
    queries = shape_of(1, QUERIES, CFG.q_heads, CFG.head_dim)
    method = open_layer(name)
    inspected = jax.jit(lambda *arrays: inspect.inspect_layer(method, *arrays, chunk))
    return temporary(inspected.lower(queries, queries, keys, keys, ints(1, QUERIES), ints(length)))


def bytes_to_pass(name, length):
    chunk = default_chunk(CFG.q_heads, length, SCORES_MIB)
    method = open_layer(name)

    def passed(layer, x, positions, budgets, lengths, dense_prefix):
        attend = Selected(method, budgets, positions, lengths, dense_prefix, chunk)
        return run_layer(layer, x, positions, attend, CFG)

    return temporary(jax.jit(passed).lower(LAYER, stream(length), ints(1, length), ints(length), ints(1), ints()))


def test_as_many_queries_are_scored_at_once_as_their_scores_have_memory():
    for length in (8_192, 32_768, LONGEST):
        chunk = default_chunk(CFG.q_heads, length, SCORES_MIB)
        assert chunk == 512 or 4 * CFG.q_heads * length * chunk <= SCORES_MIB * MIB < 4 * CFG.q_heads * length * (
            chunk + 1
        )


def test_logits_of_a_long_sequence_never_exist_whole():
    length = 32_768
    whole = 4 * length * CFG.vocab  # 6 GiB
    found = temporary(scores.score_next.lower(unembed_params(PARAMS), stream(length), ints(1, length), CFG))
    pieces = scores._LOGIT_BYTES
    assert pieces < found < 3 * pieces + 2 * 4 * length * CFG.embed < whole / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spotlight", "oracle-mass", "quest", "window"])
def test_a_method_takes_a_few_copies_of_the_scores_held_at_once(name):
    """And the layer itself, whose widest is the MLP: a few numbers of its width for each token."""
    few = 4 * SCORES_MIB * MIB
    widest = 3 * 4 * LONGEST * CFG.mlp
    assert bytes_to_inspect(name, LONGEST) < few
    assert bytes_to_pass(name, LONGEST) < few + widest < 4 * GIB


@pytest.mark.slow
def test_magicpig_takes_its_signs_too():
    signs = 4 * LONGEST * CFG.kv_heads * 1_500
    assert bytes_to_inspect("magicpig", LONGEST) < 4 * SCORES_MIB * MIB + signs < 4 * GIB
    assert bytes_to_pass("magicpig", LONGEST) < 4 * SCORES_MIB * MIB + 2 * signs < 8 * GIB


@pytest.mark.slow
def test_dense_passes_take_a_chunk_of_scores_and_the_mlp():
    """One KV head and 256 queries at once, in a few copies."""
    most = 4 * 4 * CFG.group * 256 * LONGEST + 3 * 4 * LONGEST * CFG.mlp
    assert most < 4 * GIB

    def passed(layer, x, positions, queries):
        attends = Dense(), inspect.AttentionInputs(queries), Prefill(LONGEST + 64)
        return [run_layer(layer, x, positions, attend, CFG) for attend in attends]

    for which in range(3):
        one = jax.jit(lambda *arrays, which=which: passed(*arrays)[which])
        assert temporary(one.lower(LAYER, stream(LONGEST), ints(1, LONGEST), ints(1, QUERIES))) < most


@pytest.mark.slow
def test_a_question_after_a_long_haystack_takes_its_scores_and_the_layers_cache():
    room, width = LONGEST, 64
    cached = (shape_of(1, room, CFG.kv_heads, CFG.head_dim),) * 2
    method, chunk = open_layer("spotlight"), min(width, default_chunk(CFG.q_heads, room, SCORES_MIB))

    def passed(layer, x, positions, cached, budgets, start, lengths, sparse_from):
        selected = Selected(method, budgets, positions, lengths, sparse_from, chunk)
        return run_layer(layer, x, positions, Continued(cached, start, selected), CFG)

    args = stream(width), ints(1, width), cached, ints(room), ints(), ints(1), ints()
    found = temporary(jax.jit(passed).lower(LAYER, *args))
    caches = 2 * 2 * 4 * room * CFG.kv_heads * CFG.head_dim  # with the new tokens, and as the products take them
    assert found < 4 * SCORES_MIB * MIB + caches < 2 * GIB


def test_the_streams_that_windows_keep_for_the_next_method_are_on_the_host():
    sequence = scores.Sequence(draw_tokens(40))
    selection = SelectionConfig(keep=0.5, dense_layers=(0,))
    method = model().open_method("window", selection)
    first, again = (scores.score_sequence(model(), sequence, method, selection).log_probs for _ in range(2))
    assert [type(kept) for kept in sequence.streams.values()] == [np.ndarray]
    np.testing.assert_array_equal(first, again)
