import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.models.decoder import apply_layer, embed_tokens, init_params
from spotlight_jax.models.load import load_weights
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import Dense
from tests.tolerances import tolerance
from train.capture import capture, capture_layer, draw_picks, make_mesh, take_step

POSITIONS = jnp.arange(24, dtype=jnp.int32)[None]


def test_captured_queries_and_keys_are_those_the_model_attends_with(inputs):
    cfg, params = load_weights(str(inputs.model), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, cfg.vocab, (2, 24)), jnp.int32)
    picks = jnp.asarray([[0, 3, 5, 20, 23], [1, 2, 9, 10, 22]], jnp.int32)
    seen = []

    def attend(queries, keys, values):
        return Dense()(queries, keys, values)[0], (queries, keys)

    positions, x = jnp.broadcast_to(jnp.arange(24)[None], (2, 24)), embed_tokens(params, tokens, cfg)
    layer_of = jax.jit(apply_layer, static_argnames=("attend", "cfg"))
    for layer in range(cfg.layers):  # as decoder.forward does
        x, aux = layer_of(params[f"layer_{layer}"], x, positions, attend, cfg)
        seen.append(aux)
    got = capture(params, tokens, positions[None], picks, cfg, make_mesh())
    assert len(seen) == cfg.layers
    for layer, (queries, keys) in enumerate(seen):
        for window in range(2):
            want = queries[window, picks[window]]
            np.testing.assert_allclose(got.queries[layer, window], want, **tolerance("float32"))
            np.testing.assert_allclose(got.keys[layer, window], keys[window], **tolerance("float32"))
            np.testing.assert_array_equal(got.picks[layer, window], picks[window])


def test_ways_of_placing_windows_follow_each_other(inputs):
    cfg, params = load_weights(str(inputs.model), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, cfg.vocab, (2, 24)), jnp.int32)
    picks = jnp.asarray([[0, 3], [1, 22]], jnp.int32)
    near = jnp.tile(POSITIONS, (2, 1))
    far = near + jnp.asarray([[0] * 10 + [70] * 14, [5] * 24], jnp.int32)
    both = capture(params, tokens, jnp.stack([near, far]), picks, cfg, make_mesh())
    for place, positions in enumerate((near, far)):
        alone = capture(params, tokens, positions[None], picks, cfg, make_mesh())
        rows = slice(place * cfg.layers, (place + 1) * cfg.layers)
        jax.tree.map(lambda leaf, own, rows=rows: np.testing.assert_array_equal(leaf[rows], own), both, alone)
    assert not np.array_equal(both.keys[: cfg.layers], both.keys[cfg.layers :])


def test_weights_in_the_hosts_memory_give_the_same(inputs):
    cfg, params = load_weights(str(inputs.model), jnp.float32)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab, (1, 24)).astype(np.int32)
    args = (jnp.asarray(tokens), POSITIONS[None], jnp.asarray([[1, 7, 23]], jnp.int32), cfg, make_mesh())
    found, wanted = capture(jax.tree.map(np.asarray, params), *args), capture(params, *args)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_layer_that_passes_nothing_on_sees_the_same_and_computes_projections_alone():
    cfg = PRESETS["tiny"]
    params = init_params(jax.random.key(0), cfg)["layer_0"]
    x = jax.random.normal(jax.random.key(1), (1, 24, cfg.embed))
    args = (params, x, POSITIONS, jnp.asarray([[1, 7, 23]], jnp.int32), cfg, make_mesh())
    after, seen = capture_layer(*args)
    nothing, same = capture_layer(*args, passes_on=False)
    assert after.shape == x.shape and nothing is None
    jax.tree.map(np.testing.assert_array_equal, seen, same)
    flops = capture_layer.lower(*args, passes_on=False).compile().cost_analysis()["flops"]
    queries_keys = 2 * 24 * cfg.embed * (cfg.q_heads + cfg.kv_heads) * cfg.head_dim
    mlp = 2 * 24 * cfg.embed * 3 * cfg.mlp
    assert queries_keys < flops < queries_keys + mlp / 2


def test_a_step_takes_one_window_and_one_draw(inputs):
    cfg, params = load_weights(str(inputs.model), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, cfg.vocab, (2, 24)), jnp.int32)
    picks = jnp.asarray([[0, 3, 5, 20, 1, 23], [1, 2, 9, 10, 11, 22]], jnp.int32)
    positions = jnp.tile(POSITIONS, (2, 1))
    captured = capture(params, tokens, positions[None], picks, cfg, make_mesh())
    step = take_step(captured, jnp.int32(1), jnp.int32(2), 2)
    np.testing.assert_array_equal(step.picks, np.tile([11, 22], (cfg.layers, 1)))
    np.testing.assert_array_equal(step.queries, captured.queries[:, 1, 4:6])
    np.testing.assert_array_equal(step.keys, captured.keys[:, 1])


@pytest.mark.parametrize(("window", "count"), [(40, 7), (6, 6)])
def test_each_draw_of_picks_is_sorted_and_has_no_repeats(window, count):
    draws = np.asarray(draw_picks(jax.random.key(3), window, count, 5)).reshape(5, count)
    assert (np.diff(draws, axis=1) > 0).all()
    assert draws.min() >= 0 and draws.max() < window
    if count < window:
        assert len({tuple(draw) for draw in draws}) == 5
