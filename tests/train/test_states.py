import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import hashing
from spotlight_jax.errors import InputError
from train.states import StateStore
from train.step import OptimizerConfig, init_state


def _state(code_bits=32, seed=0):
    cfg, shape = hashing.HashConfig(code_bits=code_bits), hashing.HeadShape(2, 4, 2, 6)
    params = hashing.init_params(jax.random.key(seed), cfg, shape)
    return init_state(params, OptimizerConfig(), 10)


def test_the_newest_state_comes_back_whole_and_only_so_many_are_kept(tmp_path):
    store = StateStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        store.save(step, _state(seed=step), {"text": {"taken": [step]}})
    store.save(3, _state(seed=9), {"text": {"taken": [9]}})  # saved already: left as it is
    store.close()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    reopened = StateStore(tmp_path / "checkpoints", keep=2)
    step, state, position = reopened.load(_state())
    reopened.close()
    assert (step, position) == (3, {"text": {"taken": [3]}})
    jax.tree.map(np.testing.assert_array_equal, state, _state(seed=3))
    assert jax.tree.structure(state) == jax.tree.structure(_state())


def test_states_of_other_shapes_or_none_are_refused(tmp_path):
    store = StateStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        store.load(_state())
    store.save(4, _state(code_bits=32), {"at": 1})
    with pytest.raises(InputError, match="checkpoint 4 is damaged or of another model or config"):
        store.load(_state(code_bits=64))
    store.close()


def test_a_state_that_is_still_being_written_can_be_changed(tmp_path):
    store = StateStore(tmp_path / "checkpoints", keep=1)
    state = _state()
    want = jax.tree.map(np.asarray, state)
    store.save(1, state, {})
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state)
    _, got, _ = store.load(_state(seed=1))
    store.close()
    jax.tree.map(np.testing.assert_array_equal, got, want)
