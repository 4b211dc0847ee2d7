"""Decoding that estimates what it does not read: laws of the cache's moments, and the same by evaluation's way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.methods.opening import open_method
from eval.model.load import EvalModel
from eval.model.scores import Sequence, prefill, score_sequence, score_tokens
from spotlight_jax import tail
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.memory import tokens_read
from spotlight_jax.moments import BLOCK, add_tokens, empty_moments
from tests.eval import tiny

LAYERS, Q_HEADS = tiny.MODEL.layers, tiny.MODEL.q_heads
SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))


@functools.cache
def selector(per_query_head=False):
    """With corrections that do something, each head's its own, and one head that has no tail."""
    rng = np.random.default_rng(0)
    start = tail.init_tail(LAYERS, Q_HEADS)
    drawn = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), start)
    drawn = drawn.replace(gate=start.gate.at[1, 0].set(0.0))
    base = tiny.make_selector(per_query_head)
    return dataclasses.replace(base, params=base.params.replace(tail=drawn))


def make_engine(selection=SPARSE, **fields):
    return Engine(
        tiny.MODEL, tiny.model().params, selector(), DecodeConfig(selection=selection, prefill_chunk=32, **fields)
    )


def run(engine, prompts, new):
    state = engine.prefill(prompts, new)
    chosen = [np.asarray(state.tokens)[:, None]]
    while not np.asarray(state.is_done).all():
        state, tokens = engine.decode(state)
        chosen.append(tokens)
    return np.concatenate(chosen, axis=1)[:, :new], state


def draw(length, seed=0):
    return tiny.draw_tokens(length, seed).tolist()


def moments_of(layer, length, row=0):
    """By one pass over what is cached in full blocks."""
    positions = jnp.arange(layer.keys.shape[1])
    is_counted = (positions > 0) & (positions < length // BLOCK * BLOCK)
    rows = layer.keys[row : row + 1], layer.values[row : row + 1], is_counted[None]
    return add_tokens(empty_moments(1, *layer.keys.shape[2:], layer.keys.dtype), *rows)


def test_moments_after_a_ragged_batch_and_a_second_turn_are_those_of_what_is_cached():
    """Sequences end at different steps, and the shorter one's steps that nobody reads leave no trace."""
    engine = make_engine()
    state = engine.prefill([draw(61), draw(127, 1)], [9, 3])
    while not np.asarray(state.is_done).all():
        state, _ = engine.decode(state)
    state = engine.prefill([draw(5, 2), draw(40, 3)], 4, cache=state.cache)
    while not np.asarray(state.is_done).all():
        state, _ = engine.decode(state)
    lengths = np.asarray(state.cache.lengths)
    assert len(set(lengths.tolist())) == 2
    for layer in state.cache.layers[1:]:
        for row, length in enumerate(lengths):
            for found, expected in zip(
                jax.tree.leaves(layer.moments), jax.tree.leaves(moments_of(layer, length, row)), strict=True
            ):
                np.testing.assert_allclose(found[row : row + 1], expected, rtol=2e-4, atol=2e-4)
    assert state.cache.layers[0].moments is None  # always read densely


def test_decoding_with_a_tail_chooses_what_evaluation_with_a_tail_does():
    """The engine knows moments, evaluation knows all logits: the same estimate."""
    prompt, new = draw(90), 12
    tokens, _ = run(make_engine(), [prompt], new)
    model = dataclasses.replace(tiny.model(), selector=selector())
    method = open_method("spotlight+tail", selector(), SPARSE, selector().shape)
    context = prefill(model, prompt, 128, len(prompt) + new)
    first, written = int(tokens[0, 0]), []
    for token in [first, *tokens[0, 1:-1].tolist()]:
        scores = score_tokens(model, [token], method, SPARSE, context, extends=True)
        written.append(int(scores.best[0]))
    assert written == tokens[0, 1:].tolist()
    untailed, _ = run(make_engine(tail=False), [prompt], new)
    assert untailed.tolist() != tokens.tolist(), "the tail changes nothing here: take another prompt"


def test_alone_is_as_in_a_ragged_batch():
    engine, prompts = make_engine(), [draw(61), draw(17, 1), draw(40, 2)]
    together, _ = run(engine, prompts, 10)
    for row, prompt in enumerate(prompts):
        assert run(engine, [prompt], 10)[0][0].tolist() == together[row].tolist()


def test_a_budget_of_everything_is_dense_with_the_tail_on():
    everything = dataclasses.replace(SPARSE, keep=1.0)
    sparse, _ = run(make_engine(everything), [draw(50)], 10)
    dense, _ = run(Engine(tiny.MODEL, tiny.model().params, None, DecodeConfig(prefill_chunk=32)), [draw(50)], 10)
    assert sparse.tolist() == dense.tolist()


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("name", ["spotlight", "oracle-mass", "quest", "window"])
def test_evaluation_with_a_tail_and_everything_read_is_dense(name, per_query_head):
    per = "query_head" if per_query_head else "kv_head"
    selection = SelectionConfig(keep=1.0, min_context=0, per=per, dense_layers=(0,))
    chosen = selector(per_query_head)
    model = dataclasses.replace(tiny.model(), selector=chosen)
    sequence = Sequence(tiny.draw_tokens(70))
    dense = score_sequence(model, sequence, open_method("dense", None, selection, chosen.shape), selection)
    tailed = score_sequence(model, sequence, open_method(f"{name}+tail", chosen, selection, chosen.shape), selection)
    np.testing.assert_allclose(tailed.log_probs, dense.log_probs, atol=1e-4)


def test_the_tail_brings_the_tiny_model_nearer_to_dense():
    """Even with corrections that change nothing, for any method."""
    model: EvalModel = tiny.model()
    sequence, shape = Sequence(tiny.draw_tokens(200)), selector().shape
    open_it = functools.partial(open_method, selection=SPARSE, shape=shape)
    dense = score_sequence(model, sequence, open_it("dense", None), SPARSE).log_probs
    for name in ("window", "oracle-mass"):
        plain, tailed = (
            np.square(score_sequence(model, sequence, open_it(own, None), SPARSE).log_probs - dense).mean()
            for own in (name, f"{name}+tail")
        )
        assert tailed < 0.9 * plain, name


def test_bytes_count_the_moments():
    selection = dataclasses.replace(SPARSE, dense_layers=())
    model, sequence = dataclasses.replace(tiny.model(), selector=selector()), Sequence(tiny.draw_tokens(90))
    plain, tailed = (
        score_sequence(model, sequence, open_method(name, selector(), selection, selector().shape), selection)
        for name in ("spotlight", "spotlight+tail")
    )
    heads, dim = tiny.MODEL.kv_heads, tiny.MODEL.head_dim
    moved = LAYERS * 4 * (1 + heads * (2 * dim + 2 * dim * dim))
    np.testing.assert_allclose(tailed.index_bytes - plain.index_bytes, moved)
    assert not plain.estimated.any() and (tailed.estimated[:BLOCK] == 0).all()
    assert ((tailed.estimated[BLOCK + 8 :] > 0) & (tailed.estimated[BLOCK + 8 :] < 1)).all()


def test_reports_count_the_newest_tokens():
    """At most: some of them may be selected, too. A budget of a fifth, at least five."""
    lengths = np.asarray([1, 4, 30, 64, 65, 300], np.int32)
    plain, tailed = (tokens_read(lengths, SPARSE, has_tail).tolist() for has_tail in (False, True))
    assert plain == [1, 4, 6, 13, 13, 60]
    newest = [sum(place // BLOCK == (length - 1) // BLOCK for place in range(length)) for length in lengths]
    assert tailed == [min(one + more, length) for one, more, length in zip(plain, newest, lengths, strict=True)]
