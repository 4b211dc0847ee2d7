import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.config.data import DataConfig
from spotlight_jax.config.hashing import FORMS, NetworkConfig, TransformConfig
from spotlight_jax.config.ranking import MassLoss
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from train.capture import Captured
from train.config import EvaluationConfig, LayerwiseConfig, OptimizerConfig
from train.evaluate import evaluate
from train.fit import fit

SHAPE = HeadShape(2, 6, 2, 8)
KEPT = EvaluationConfig(keep=0.1, queries=8)


def _config(form="transform"):
    return LayerwiseConfig(
        fit_windows=2,
        data=DataConfig(window=200),
        hash=FORMS[form](form, code_bits=32),
        ranking=MassLoss(target="kv_head", top_share=0.1, min_top=8, queries=16),
        optimizer=OptimizerConfig(),
        measure=KEPT,
    )


def _window(seed):
    """Keys with a mean, and dimensions of unequal spread that queries do not look at alike."""
    rng = np.random.default_rng(seed)
    spread = np.geomspace(4, 0.1, 8)
    queries = rng.normal(size=(2, 16, 6, 8)) * spread[::-1] ** 0.5 * 3
    keys = rng.normal(size=(2, 200, 2, 8)) * spread + 2
    picks = np.tile(np.linspace(100, 199, 16).astype(np.int32), (2, 1))
    return Captured(jnp.asarray(queries, jnp.float32), jnp.asarray(picks), jnp.asarray(keys, jnp.float32))


def _fit(cfg, seeds=(0, 1)):
    seen = []
    params = init_functions(jax.random.key(0), cfg.hash, SHAPE)
    return params, fit(params, map(_window, seeds), cfg, lambda *counts: seen.append(counts)), seen


@pytest.mark.parametrize("form", ["transform", "asymmetric", "symmetric"])
def test_fitting_to_windows_finds_more_of_the_oracles_choice_in_another(form):
    cfg = _config(form)
    before, after, seen = _fit(cfg)
    held_out = [_window(7)]
    quality = [evaluate(params, held_out, KEPT, 1) for params in (before, after)]
    assert quality[1].iou.mean() > quality[0].iou.mean() + (0.2 if form == "transform" else 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert seen == [(1, 2), (2, 2)]


def test_the_same_windows_give_the_same_hash_functions_and_others_do_not():
    cfg = _config()
    first, again, other = (_fit(cfg, seeds)[1] for seeds in ((0, 1), (0, 1), (2, 3)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.stats.axes, other.stats.axes)


def test_hash_functions_of_keys_as_they_are_need_no_windows():
    assert [
        init_functions(jax.random.key(0), cfg, SHAPE).fitted_to
        for cfg in (TransformConfig(), NetworkConfig("symmetric"), NetworkConfig("symmetric", centre=False))
    ] == ["windows", "moments", "nothing"]
