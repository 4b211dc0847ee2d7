from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import runs
from spotlight_jax.errors import InputError
from spotlight_jax.models.load import load_weights
from tests.models import tiny
from train import hidden_cache, layerwise
from train.capture import capture, make_mesh
from train.hidden_cache import GIB, CachePlan, HiddenCache, capture_cached, plan_cache
from train.positions import draw_positions

WINDOWS, WINDOW, LENGTH = 5, 24, 60
TOKENS = np.random.default_rng(3).integers(0, tiny.VOCAB, (WINDOWS, WINDOW)).astype(np.int32)
PICKS = np.asarray([[2, 7, 23]], np.int32)
IDENTITY = {"model": "a"}


def _draw(first, count):
    return TOKENS[first : first + count]


def _place(first, count):
    numbers = range(first, first + count)
    return np.stack([[draw_positions(WINDOW, length, 0, number) for number in numbers] for length in (WINDOW, LENGTH)])


@pytest.fixture
def read(inputs):
    """Captures one window from a cache and streaming, compares them bit for bit."""
    cfg, params = load_weights(str(inputs.model), jnp.float32)

    def read_one(cache, window):
        got = capture_cached(
            cache,
            params,
            _draw,
            _place,
            window,
            jnp.asarray(PICKS),
            cfg,
            make_mesh(),
            progress=lambda done, total: None,
        )
        rows = _draw(window, 1), _place(window, 1), PICKS
        want = capture(params, *map(jnp.asarray, rows), cfg, make_mesh())
        np.testing.assert_array_equal(got.queries, want.queries)
        np.testing.assert_array_equal(got.keys, want.keys)

    return read_one


@pytest.fixture
def filled(monkeypatch):
    """Numbers of windows that went through the model."""
    numbers, real = [], hidden_cache.hidden_states

    def counted(params, tokens, positions, cfg):
        numbers.append(next(n for n in range(WINDOWS) if np.array_equal(TOKENS[n], tokens[0])))
        return real(params, tokens, positions, cfg)

    monkeypatch.setattr(hidden_cache, "hidden_states", counted)
    return numbers


def _files(folder):
    return sorted(int(file.stem[-7:]) for file in folder.glob("*.npy"))


def test_the_plan_counts_bytes_and_keeps_to_the_limit(inputs):
    cfg, _ = load_weights(str(inputs.model), jnp.float32)
    each = 3 * 100 * 32 * 2  # layers, tokens, width, bytes
    assert plan_cache(cfg, jnp.dtype("bfloat16"), 100, 7, 1.0) == CachePlan(each, 7, 7)
    small = plan_cache(cfg, jnp.dtype("bfloat16"), 100, 7, 2.9 * each / GIB)
    assert small == CachePlan(each, 7, 2) and small.disk_bytes == 2 * each
    with pytest.raises(InputError, match="over --cache-gib"):
        plan_cache(cfg, jnp.dtype("bfloat16"), 100, 7, 0.9 * each / GIB)


def test_each_window_passes_the_model_once_and_at_most_so_many_lie_on_disk(tmp_path, read, filled):
    cache = HiddenCache(tmp_path / "cache", CachePlan(1, WINDOWS, 2), IDENTITY)
    for window, on_disk in enumerate([[0, 1], [0, 1], [2, 3], [2, 3], [4]]):
        read(cache, window)
        assert _files(tmp_path / "cache") == on_disk
    assert filled == list(range(WINDOWS))


def test_an_interrupted_filling_is_continued(tmp_path, read, filled):
    plan = CachePlan(1, WINDOWS, WINDOWS)
    real_write = HiddenCache.write

    def interrupted(self, window, hidden, tokens):
        if window == 3:
            (tmp_path / "cache" / f"{self.file(window).name}.1234.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real_write(self, window, hidden, tokens)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HiddenCache, "write", interrupted)
        read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    assert _files(tmp_path / "cache") == [0, 1, 2]
    again = HiddenCache(tmp_path / "cache", plan, IDENTITY)
    for window in range(WINDOWS):
        read(again, window)
    assert filled == [0, 1, 2, 3, 3, 4]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_bfloat16_states_come_back_bit_for_bit(tmp_path):
    cache = HiddenCache(tmp_path / "cache", CachePlan(1, 1, 1), IDENTITY)
    states = np.asarray(jnp.linspace(-3, 3, 24).reshape(2, 3, 4).astype(jnp.bfloat16))
    cache.write(0, states, TOKENS[0])
    got = cache.read(0, states.dtype)
    assert got.dtype == states.dtype
    np.testing.assert_array_equal(got.view(np.uint16), states.view(np.uint16))


def test_a_cache_of_something_else_is_refused(tmp_path):
    plan = CachePlan(1, 1, 1)
    HiddenCache(tmp_path / "cache", plan, IDENTITY)
    HiddenCache(tmp_path / "cache", plan, IDENTITY)  # the same again is welcome
    with pytest.raises(InputError, match="another model, text or seed"):
        HiddenCache(tmp_path / "cache", plan, {"model": "b"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="no cache of ours"):
        HiddenCache(tmp_path / "mine", plan, IDENTITY)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_disk_too_small_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = hidden_cache.shutil.disk_usage(tmp_path)._replace(free=3 * GIB)
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs 10\.0 GiB and .* has 3\.0; lower --cache-gib"):
        HiddenCache(tmp_path / "cache", CachePlan(5 * GIB, 9, 2), IDENTITY)
    assert not (tmp_path / "cache").exists()
    HiddenCache(tmp_path / "cache", CachePlan(GIB, 9, 3), IDENTITY)


DAMAGES = {
    "one bit": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_states_that_are_damaged_are_made_again(damage, tmp_path, read, filled):
    plan = CachePlan(1, WINDOWS, WINDOWS)
    read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    cache = HiddenCache(tmp_path / "cache", plan, IDENTITY)
    cache.file(2).write_bytes(DAMAGES[damage](cache.file(2).read_bytes()))
    for window in range(WINDOWS):
        read(cache, window)  # equal to streaming
    assert filled == [0, 1, 2, 3, 4, 2]


def test_states_of_other_tokens_are_made_again(tmp_path, read, monkeypatch):
    plan = CachePlan(1, WINDOWS, WINDOWS)
    read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    monkeypatch.setitem(globals(), "TOKENS", (TOKENS + 1) % tiny.VOCAB)  # the text was replaced in place
    cache = HiddenCache(tmp_path / "cache", plan, IDENTITY)
    for window in range(WINDOWS):
        read(cache, window)  # equal to streaming


def test_other_weights_of_the_same_model_are_another_cache(inputs, tmp_path):
    cfg, params = load_weights(str(inputs.model), jnp.float32)
    other = params | {"layer_1": jax.tree.map(lambda leaf: leaf.at[..., 0].multiply(2), params["layer_1"])}
    dtype = np.dtype("float32")
    identities = [hidden_cache.identify(each, cfg, "text", (64,), dtype) for each in (params, other, params)]
    assert identities[0] == identities[2] != identities[1]
    HiddenCache(tmp_path / "cache", CachePlan(1, 1, 1), identities[0])
    with pytest.raises(InputError, match="another model, text or seed"):
        HiddenCache(tmp_path / "cache", CachePlan(1, 1, 1), identities[1])


@pytest.mark.parametrize("content", ["", '{"mod', "[]"])
def test_a_manifest_that_was_cut_is_written_again_and_the_states_with_it(content, tmp_path, read, filled):
    plan = CachePlan(1, WINDOWS, 1)
    read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    (tmp_path / "cache" / "manifest.json").write_text(content)
    read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    assert filled == [0, 0]
    read(HiddenCache(tmp_path / "cache", plan, IDENTITY), 0)
    assert filled == [0, 0]


def test_a_folder_that_cannot_be_made_is_said_to_be_that(tmp_path):
    with pytest.raises(InputError, match="cannot write to '/proc/nope': No such file or directory"):
        HiddenCache(Path("/proc/nope"), CachePlan(1, 1, 1), IDENTITY)


def test_a_cache_that_another_process_fills_is_refused(inputs, tmp_path, capsys):
    cache = tmp_path / "cache"
    with runs.hold(cache):
        assert layerwise.command([*inputs.flags(tmp_path / "run"), "--cache-dir", str(cache)]) == 2
    assert f"'{cache}' is being written by process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
