import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import open_windows
from train.capture import Captured
from train.config import LayerwiseConfig
from train.data import Feed, FeedConfig
from train.estimate import estimate_memory, plan_run

WINDOW, QUERIES, PER_WINDOW = 16, 3, 2


def _capture(first, tokens, positions, picks):
    """Stands in for the model: queries and keys tell which token, position and layer they come from."""
    layers, windows = 2, tokens.shape[0]
    tokens, layer = jnp.asarray(tokens, jnp.float32), jnp.arange(layers, dtype=jnp.float32)
    queries = jnp.take_along_axis(tokens, picks, axis=1)[None, :, :, None, None] + 1000 * layer.reshape(2, 1, 1, 1, 1)
    keys = tokens[None, :, :, None, None] + 1000 * layer.reshape(2, 1, 1, 1, 1)
    return Captured(queries=queries, picks=jnp.broadcast_to(picks[None], (layers, windows, picks.shape[1])), keys=keys)


@pytest.fixture
def open_feed(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(400, dtype=np.uint16))

    def open_one(windows_at_once=1, windows_kept=0, capture=_capture):
        cfg = DataConfig(train=(str(tmp_path / "t.npy"),), window=WINDOW, held_out_windows=2)
        feed_cfg = FeedConfig(WINDOW, (WINDOW,), 0, QUERIES, PER_WINDOW, windows_at_once, windows_kept)
        return Feed(open_windows(cfg, None, 400), capture, jax.random.key(5), feed_cfg)

    return open_one


def _same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("windows_at_once", [2, 4])
def test_windows_captured_together_change_nothing(open_feed, windows_at_once):
    alone, together = open_feed(1), open_feed(windows_at_once)
    for step in range(10):
        _same(alone.at(step), together.at(step))
        assert alone.position(step + 1) == together.position(step + 1)


def test_steps_of_a_window_share_its_keys_and_draw_their_own_queries(open_feed):
    feed = open_feed()
    steps = [feed.at(step) for step in range(4)]
    np.testing.assert_array_equal(steps[0].keys, steps[1].keys)
    assert not np.array_equal(steps[1].keys, steps[2].keys)
    assert not np.array_equal(steps[0].picks, steps[1].picks)
    np.testing.assert_array_equal(steps[3].queries[0, :, 0, 0], steps[3].keys[0, :, 0, 0][steps[3].picks[0]])


@pytest.mark.parametrize("windows_at_once", [1, 4])
@pytest.mark.parametrize("step", [0, 1, 5, 6])  # 1 and 5 lie within a window
def test_a_restored_feed_goes_on_where_it_was(open_feed, windows_at_once, step):
    whole = open_feed(windows_at_once)
    for done in range(step):
        whole.at(done)
    position = whole.position(step)
    resumed = open_feed(1)
    list(resumed.first_windows(3, 2))  # as a run does to fit its hash functions
    resumed.restore(step, position)
    for following in range(step, step + 4):
        _same(whole.at(following), resumed.at(following))


def test_forgetting_captures_the_same_again(open_feed):
    feed = open_feed(2)
    before = feed.at(3)
    feed.forget()
    _same(before, feed.at(3))


@pytest.mark.parametrize("windows_at_once", [1, 2, 4])
def test_the_first_windows_are_those_that_steps_see(open_feed, windows_at_once):
    feed, alone = open_feed(windows_at_once), open_feed(1)
    first = list(feed.first_windows(3, 1))
    assert [seen.keys.shape[0] for seen in first] == [1, 1, 1]  # of so many layers
    for number, seen in enumerate(first):
        np.testing.assert_array_equal(seen.keys, alone.at(number * PER_WINDOW).keys[:1])
    _same(feed.at(0), open_feed(1).at(0))  # nothing was taken


@pytest.mark.parametrize("windows_at_once", [1, 2])
def test_windows_that_are_kept_are_captured_once(open_feed, windows_at_once):
    captured = []

    def capture(first, *args):
        captured.append(first)
        return _capture(first, *args)

    feed, anew = open_feed(windows_at_once, 2, capture), open_feed(windows_at_once)
    list(feed.first_windows(4, 2))
    for step in range(10):
        _same(feed.at(step), anew.at(step))
        assert feed.position(step + 1) == anew.position(step + 1)
    fitted_to, trained_on = ([0, 1, 2, 3], [2, 3, 4]) if windows_at_once == 1 else ([0, 2], [2, 4])
    assert captured == fitted_to + trained_on


@pytest.mark.parametrize(("fit_windows", "steps", "kept"), [(3, 200, 3), (8, 200, 4), (4, 3, 2)])
def test_a_cpu_keeps_as_many_windows_as_steps_will_ask_for_and_few(fit_windows, steps, kept):
    cfg = LayerwiseConfig(model="random:tiny", fit_windows=fit_windows, steps=steps, steps_per_window=PER_WINDOW)
    plan = plan_run(dataclasses.replace(cfg, data=DataConfig(window=256)))
    assert plan.windows_kept == kept
    one = plan.rows * 4 * plan.shape.head_dim * (256 * plan.shape.kv_heads + PER_WINDOW * 256 * plan.shape.q_heads)
    (held,) = (size for name, size in estimate_memory(plan).items() if "--fit-windows" in name)
    assert held == max(kept, plan.windows_at_once) * -(-plan.rows // plan.mesh.size) * one // plan.rows
