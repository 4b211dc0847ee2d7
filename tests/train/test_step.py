import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.ranking import MassLoss, PairLoss
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.losses.ranking import ranking_loss
from train.capture import Captured, make_mesh
from train.config import AnnealedOptimizerConfig, OptimizerConfig
from train.step import StepConfig, gamma_at, init_state, make_optimizer, train_step

SHAPE = HeadShape(layers=3, q_heads=4, kv_heads=2, head_dim=6)
NETWORKS = NetworkConfig(form="asymmetric", code_bits=32, hidden=5)
TRANSFORM = TransformConfig(code_bits=32)
PAIRS = PairLoss(queries=4, tops=3, others=7, min_top=3, always_top=1)
MASS = MassLoss(target="kv_head", softness=0.1, queries=4, min_top=3)
RECIPES = {"networks by pairs": (NETWORKS, PAIRS), "transform by mass": (TRANSFORM, MASS)}
OPTIMIZER = AnnealedOptimizerConfig(warmup=0.1, clip=0.01)
STEPS = 20


def _capture(picks):
    rng = np.random.default_rng(0)
    return Captured(
        queries=jnp.asarray(rng.standard_normal((3, len(picks), 4, 6)), jnp.float32),
        picks=jnp.tile(jnp.asarray([picks], jnp.int32), (3, 1)),
        keys=jnp.asarray(rng.standard_normal((3, picks[-1] + 1, 2, 6)), jnp.float32),
    )


@pytest.fixture
def captured():
    return _capture([5, 9, 14, 19])


@pytest.fixture(params=RECIPES)
def recipe(request):
    """Hash functions and how they are trained."""
    hash_cfg, loss = RECIPES[request.param]
    return hash_cfg, _config(loss)


def _config(loss, optimizer=OPTIMIZER):
    return StepConfig(loss, optimizer, STEPS, 1, make_mesh())


def _state(hash_cfg, cfg):
    return init_state(init_functions(jax.random.key(0), hash_cfg, SHAPE), cfg.optimizer, STEPS)


def _first_moments(state, layer):
    moments = next(part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part))
    return [np.asarray(leaf[layer]) for leaf in jax.tree.leaves(moments)]


def _is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


@pytest.mark.slow
def test_each_layer_is_clipped_by_its_own_norm(captured):
    cfg = _config(PAIRS)
    small = jax.tree.map(np.asarray, train_step(_state(NETWORKS, cfg), jax.random.key(1), jnp.int32(0), captured, cfg))
    # the gain of layer 1's scores multiplies its gradients
    state = _state(NETWORKS, cfg)
    gain = state.params.weights.log_head_scale.at[1].add(4.0)
    weights = dataclasses.replace(state.params.weights, log_head_scale=gain)
    state = state.replace(params=state.params.replace(weights=weights))
    large = jax.tree.map(np.asarray, train_step(state, jax.random.key(1), jnp.int32(0), captured, cfg))
    assert large[1].grad_norm[1] > 10 * small[1].grad_norm[1] > 10 * OPTIMIZER.clip
    for layer in range(3):
        norm = math.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in _first_moments(large[0], layer)))
        assert norm == pytest.approx((1 - OPTIMIZER.b1) * OPTIMIZER.clip, rel=1e-4)
    for layer in (0, 2):
        first, second = (jax.tree.map(lambda leaf: leaf[layer], run[0]) for run in (small, large))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_a_layer_steps_as_plain_optax_would(captured, recipe):
    hash_cfg, cfg = recipe
    layer, lr = 2, [0.0, OPTIMIZER.learning_rate / 2, OPTIMIZER.learning_rate]  # a warm-up of two steps
    state = _state(hash_cfg, cfg)
    alone = state.params.layer(layer)
    weights = alone.weights
    seen = [leaf[layer] for leaf in (captured.queries, captured.picks, captured.keys)]

    def loss_of(weights, layer_key, gamma):
        return ranking_loss(alone.replace(weights=weights), layer_key, *seen, gamma, cfg.ranking)[0]

    grads_of = jax.jit(jax.grad(loss_of))
    moments = optax.scale_by_adam(b1=0.9, b2=0.98).init(weights)
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(7), step)
        grads = grads_of(weights, jax.random.fold_in(key, layer), gamma_at(jnp.int32(step), OPTIMIZER, STEPS))
        norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda leaf: leaf * min(1.0, OPTIMIZER.clip / norm), grads)  # noqa: B023
        updates, moments = optax.scale_by_adam(b1=0.9, b2=0.98).update(grads, moments)
        weights = jax.tree.map(lambda w, u: w - lr[step] * (u + 0.1 * w), weights, updates)  # noqa: B023
        state, _ = train_step(state, key, jnp.int32(step), captured, cfg)
    got = state.params.layer(layer).weights
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, weights)


def test_the_learning_rate_warms_up_and_then_follows_a_cosine():
    cfg = OptimizerConfig(learning_rate=0.5, warmup=0.1, weight_decay=0.0, clip=10.0)
    optimizer = make_optimizer(cfg, 100)
    state = optimizer.init(jnp.float32(0))
    for step in range(100):
        update, state = optimizer.update(jnp.float32(1), state, jnp.float32(0))  # a constant gradient: Adam gives 1
        want = step / 10 if step < 10 else (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert -float(update) == pytest.approx(0.5 * want, rel=1e-3, abs=1e-6)


def test_gamma_grows_geometrically_and_then_stays():
    cfg = AnnealedOptimizerConfig(gamma_start=4.0, gamma_end=64.0, anneal=0.5)
    got = [float(gamma_at(jnp.int32(step), cfg, 80)) for step in (0, 10, 20, 40, 79)]
    np.testing.assert_allclose(got, [4, 8, 16, 64, 64], rtol=1e-5)


def test_gamma_without_annealing_is_the_same_throughout():
    cfg = AnnealedOptimizerConfig(gamma_start=4.0, gamma_end=48.0, anneal=0.0)
    assert [float(gamma_at(jnp.int32(step), cfg, 80)) for step in (0, 40, 79)] == [48, 48, 48]


@pytest.mark.slow
def test_an_average_of_the_weights_forgets_by_its_decay_and_leaves_training_as_it_is(captured, recipe):
    optimizer, hash_cfg = dataclasses.replace(OPTIMIZER, ema=0.7, learning_rate=0.1), recipe[0]
    cfg = dataclasses.replace(recipe[1], optimizer=optimizer)
    without = dataclasses.replace(cfg, optimizer=dataclasses.replace(optimizer, ema=0.0))
    plain, state, seen = _state(hash_cfg, without), _state(hash_cfg, cfg), []
    jax.tree.map(np.testing.assert_array_equal, state.selector, state.params)
    for step in range(4):
        plain, _ = train_step(plain, jax.random.key(step), jnp.int32(step), captured, without)
        state, _ = train_step(state, jax.random.key(step), jnp.int32(step), captured, cfg)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (plain.params, plain.opt_state))
        jax.tree.map(np.testing.assert_array_equal, plain.selector, plain.params)
        seen.append(jax.tree.map(np.float64, state.params.weights))
        shares = 0.7 ** np.arange(step, -1, -1)
        wanted = jax.tree.map(lambda *all_of: np.average(all_of, axis=0, weights=shares), *seen)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.averaged, wanted)
    jax.tree.map(np.testing.assert_array_equal, state.selector, state.params.replace(weights=state.averaged))


def _losses(captured, hash_cfg, cfg):
    """Loss of every layer at each step, and what is wrong by it."""
    state, seen = _state(hash_cfg, cfg), []
    for _ in range(STEPS):
        state, report = train_step(state, jax.random.key(2), jnp.int32(2), captured, cfg)
        assert report.loss.shape == report.wrong.shape == (3,)
        seen.append((report.loss, report.wrong))
    return np.asarray(seen)


@pytest.mark.slow
def test_the_loss_falls_on_one_window(captured):
    losses = _losses(captured, NETWORKS, _config(PAIRS))
    assert (losses[-1, 0] < losses[0, 0]).all()


@pytest.mark.slow
def test_the_missed_mass_falls_on_one_window():
    ranking = dataclasses.replace(MASS, top_share=0.1, min_top=8, queries=16)
    cfg = _config(ranking, OptimizerConfig(learning_rate=1e-2))
    losses = _losses(_capture(list(range(80, 144, 4))), TRANSFORM, cfg)
    assert (losses[-1] < losses[0]).all()  # by the soft cut and by the hard one


@pytest.mark.slow
def test_what_was_measured_is_not_trained(captured, recipe):
    hash_cfg, cfg = recipe
    state, before = _state(hash_cfg, cfg), _state(hash_cfg, cfg).params
    for step in range(3):
        state, _ = train_step(state, jax.random.key(step), jnp.int32(step), captured, cfg)
    jax.tree.map(np.testing.assert_array_equal, state.params.stats, before.stats)
    for one, other in zip(jax.tree.leaves(state.params.weights), jax.tree.leaves(before.weights), strict=True):
        assert np.any(one != other, axis=tuple(range(1, one.ndim))).all()  # of every layer
