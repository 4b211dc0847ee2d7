"""Corrections of the tail: the error that they are trained on, and what training makes of them."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from spotlight_jax.attention import causal_attention
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.moments import with_newest
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.scoring import hash_score_range, hash_scores
from spotlight_jax.selector.selection import select_mask
from spotlight_jax.tail import attend_by_logits, init_tail
from tests.hash_params import draw_params
from train.tail import KEEPS, Examined, fit_layer, output_error

Q_HEADS, KV_HEADS, DIM, WINDOW, PICKS = 4, 2, 16, 200, 5
SHAPE = HeadShape(1, Q_HEADS, KV_HEADS, DIM)


def examine(seed=0):
    """Random queries, keys and values of one layer: the rows, and what they are of."""
    keys = jax.random.split(jax.random.key(seed), 3)
    queries, cached, values = (
        jax.random.normal(key, (1, WINDOW, heads, DIM)) * scale
        for key, heads, scale in zip(keys, (Q_HEADS, KV_HEADS, KV_HEADS), (2.0, 1.0, 1.0), strict=True)
    )
    places = jnp.asarray([20, 110, 140, 170, 199], jnp.int32)
    functions = draw_params(TransformConfig(code_bits=32), SHAPE).layer(0)
    attend = Examined(functions, places)
    outputs, rows = jax.jit(lambda *args: attend(*args))(queries, cached, values)
    np.testing.assert_allclose(outputs, causal_attention(queries, cached, values), atol=1e-5)
    return (queries, cached, values, places, functions), rows


def draw_tail(seed=1):
    rng = np.random.default_rng(seed)
    start = jax.tree.map(lambda leaf: leaf[0], init_tail(1, Q_HEADS))
    drawn = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), start)
    return drawn.replace(gate=start.gate)


def test_the_error_of_rows_is_that_of_attention_with_the_tail():
    """Least budgets of 20 tokens: all budgets but the largest read the same here."""
    (queries, keys, values, places, functions), rows = examine()
    params = draw_tail()
    error = np.asarray(jax.jit(output_error)(rows, params))
    assert error.shape == (len(KEEPS) * PICKS, KV_HEADS, Q_HEADS // KV_HEADS)
    codes = functions.key_codes(keys)
    dense = np.asarray(causal_attention(queries, keys, values))[0, places]
    picked = queries[:, places]
    scores = hash_scores(functions, picked, codes, True)
    bounds, selection = hash_score_range(functions, 2, True), SelectionConfig(keep=KEEPS[0], dense_layers=())
    mask = with_newest(select_mask(scores, places[None], selection, bounds), places[None])
    grouped = picked.reshape(1, PICKS, KV_HEADS, 2, DIM)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, keys) * DIM**-0.5
    mask = jnp.repeat(mask, 2, axis=2).reshape(1, PICKS, KV_HEADS, 2, WINDOW).transpose(0, 2, 3, 1, 4)
    outputs, _ = jax.jit(attend_by_logits)(logits, mask, values, places[None], params)
    found = np.moveaxis(np.asarray(outputs), 3, 1)[0]
    expected = np.square(found.reshape(dense.shape) - dense).sum(-1) / np.square(dense).sum(-1)
    np.testing.assert_allclose(error[:PICKS].reshape(PICKS, Q_HEADS), expected, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_error_of_every_head_or_closes_its_gate():
    _, rows = examine()
    params, (before, after), curve = fit_layer(rows, 100, 0.05)
    start = jax.tree.map(lambda leaf: leaf[0], init_tail(1, Q_HEADS))
    untrained = np.asarray(jax.jit(output_error)(rows, start)).mean(axis=0).reshape(-1)
    gates = np.asarray(params.gate)
    assert ((gates == 1) | (after == before)).all() and (after <= before).all()
    assert (np.asarray(after)[gates == 1] < untrained[gates == 1]).all() and gates.any()
    assert curve.shape == (100,) and curve[-1] < curve[0]
    np.testing.assert_allclose(curve[0], untrained.mean(), rtol=1e-5)


def test_the_gate_of_a_head_that_the_tail_cannot_help_is_closed():
    """A head that reads all that matters: its output is dense already, whatever is added makes it worse."""
    _, rows = examine()
    products = rows.products.at[:, 0, 0, :3].set(0.0)
    params, (before, after), _ = fit_layer(rows.replace(products=products), 50, 0.05)
    assert params.gate[0] == 0 and before[0] == after[0] == 0
    assert np.isfinite(jax.flatten_util.ravel_pytree(params)[0]).all()
