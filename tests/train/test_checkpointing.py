import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import manifest
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from train.checkpointing import CheckpointStore, newest_step
from train.config import OptimizerConfig
from train.step import init_state


def _state(code_bits=32, seed=0):
    cfg, shape = TransformConfig(code_bits=code_bits), HeadShape(2, 4, 2, 6)
    params = init_functions(jax.random.key(seed), cfg, shape)
    return init_state(params, OptimizerConfig(), 10)


def test_the_newest_state_comes_back_whole_and_only_so_many_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        store.save(step, _state(seed=step), {"text": {"taken": [step]}})
    store.save(3, _state(seed=9), {"text": {"taken": [9]}})  # saved already: left as it is
    store.close()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    reopened = CheckpointStore(tmp_path / "checkpoints", keep=2)
    step, state, position, damaged = reopened.load(_state())
    reopened.close()
    assert (step, position, damaged) == (3, {"text": {"taken": [3]}}, [])
    jax.tree.map(np.testing.assert_array_equal, state, _state(seed=3))
    assert jax.tree.structure(state) == jax.tree.structure(_state())


def test_states_of_other_shapes_or_none_are_refused(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        store.load(_state())
    store.save(4, _state(code_bits=32), {"at": 1})
    with pytest.raises(InputError, match="checkpoint 4 is of another model or config"):
        store.load(_state(code_bits=64))
    store.close()


def test_a_state_that_is_still_being_written_can_be_changed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    state = _state()
    want = jax.tree.map(np.asarray, state)
    store.save(1, state, {})
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state)
    _, got, *_ = store.load(_state(seed=1))
    store.close()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def run(tmp_path):
    """A folder of three checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        store.save(step, _state(seed=step), {"text": {"taken": [step]}})
    store.close()
    return tmp_path / "checkpoints"


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "one bit": _flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_of_the_newest_checkpoint_is_damaged_the_one_before_is_taken(damage, run, tmp_path):
    names = [file.relative_to(run) for file in (run / "3").rglob("*") if file.is_file()]
    assert len(names) == 3
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        DAMAGES[damage](copy / name)
        step, why = newest_step(copy)
        assert step == 2 and list(why) == [3], name
    store = CheckpointStore(copy, keep=3)
    step, state, position, told = store.load(_state())
    assert (step, position) == (2, {"text": {"taken": [2]}})
    jax.tree.map(np.testing.assert_array_equal, state, _state(seed=2))
    assert len(told) == 1 and told[0].startswith("checkpoint 3 is damaged (") and told[0].endswith("; taking 2")
    store.save(3, _state(seed=7), {"again": True})  # its place is free
    store.close()
    assert newest_step(copy) == (3, {})


def test_a_checkpoint_whose_manifest_is_not_written_yet_does_not_count(run):
    (run / "3" / manifest.FILE).unlink()
    assert newest_step(run)[0] == 2
    for step in (1, 2):
        (run / str(step) / manifest.FILE).unlink()
    assert newest_step(run)[0] is None and newest_step(run / "none") == (None, {})


def test_a_disk_that_takes_no_more_is_one_line_and_closing_does_not_hang(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        store.save(1, _state(), {})
        with pytest.raises(OSError, match="File too large") as caught:
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename.endswith("state.safetensors")
    store.close()
    assert list((tmp_path / "checkpoints").iterdir()) == []
