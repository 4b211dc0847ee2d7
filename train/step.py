"""One optimiser step of the hash functions of all layers: they are independent, so their axis is mapped and sharded."""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from spotlight_jax.config.ranking import LossConfig
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.losses.ranking import ranking_loss
from train.capture import AXIS, Captured, padded_layers
from train.config import AnnealedOptimizerConfig, OptimizerConfig
from train.processes import put


@flax.struct.dataclass
class TrainState:
    """All that a step changes; leaves lead with a layer axis."""

    params: HashFunctions
    opt_state: Any
    averaged: Any  # the moving average of the weights, where there is one

    @property
    def selector(self) -> HashFunctions:
        """What is evaluated and exported."""
        return self.params if self.averaged is None else dataclasses.replace(self.params, weights=self.averaged)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Make one layer's optimiser: clip by the layer's own norm, then AdamW under the schedule."""
    warmup = max(1, round(cfg.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay),
    )


def gamma_at(step: Int32[Array, ""], cfg: OptimizerConfig, steps: int) -> Float[Array, ""]:
    """Return the soft sign's sharpness: geometric from gamma_start to gamma_end, then constant; 1 if none is soft."""
    if not isinstance(cfg, AnnealedOptimizerConfig):
        return jnp.float32(1)
    if cfg.anneal == 0:
        return jnp.float32(cfg.gamma_end)
    progress = jnp.minimum(step / max(1.0, cfg.anneal * steps), 1.0)
    return jnp.float32(cfg.gamma_start) * (cfg.gamma_end / cfg.gamma_start) ** progress


def ema_share(step: Int32[Array, ""], decay: float) -> Float[Array, ""]:
    """Return the share of the newest weights in their average: at first all of it, so that it needs no correction."""
    return (1 - decay) / -jnp.expm1((step + 1) * math.log(decay))


def init_state(params: HashFunctions, cfg: OptimizerConfig, steps: int) -> TrainState:
    """Make the state before the first step."""
    opt_state = jax.vmap(make_optimizer(cfg, steps).init)(params.weights)
    averaged = jax.tree.map(jnp.copy, params.weights) if cfg.ema else None  # a step donates both
    return TrainState(params=params, opt_state=opt_state, averaged=averaged)


@flax.struct.dataclass
class StepReport:
    """Per layer: the loss, the share of sampled pairs ranked wrongly (or of attention mass missed), the gradient's norm
    before clipping, and whether the model's queries and keys are all finite."""

    loss: Float[Array, "layers"]
    wrong: Float[Array, "layers"]
    grad_norm: Float[Array, "layers"]
    is_input_finite: Bool[Array, "layers"]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that shapes a step and does not change during a run."""

    ranking: LossConfig
    optimizer: OptimizerConfig
    steps: int
    layers_at_once: int
    mesh: Mesh


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def train_step(
    state: TrainState, key: PRNGKeyArray, step: Int32[Array, ""], captured: Captured, cfg: StepConfig
) -> tuple[TrainState, StepReport]:
    """Step every layer on one window: `shard_map` over the mesh, then a map over each device's own layers.

    Args:
        key: of this step; a layer's own key comes from its index, so it does not depend on how layers are spread.
        captured: one window with exactly this step's queries, leaves `[layers, ...]`.
    """
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    gamma = gamma_at(step, cfg.optimizer, cfg.steps)

    def step_layer(args: tuple[TrainState, Captured, PRNGKeyArray]) -> tuple[TrainState, StepReport]:
        state, seen, layer_key = args
        params, averaged = state.params, state.averaged

        def loss_of(weights: Any) -> tuple[Array, Array]:
            layer = dataclasses.replace(params, weights=weights)
            return ranking_loss(layer, layer_key, seen.queries, seen.picks, seen.keys, gamma, cfg.ranking)

        (loss, wrong), grads = jax.value_and_grad(loss_of, has_aux=True)(params.weights)
        updates, opt_state = optimizer.update(grads, state.opt_state, params.weights)
        weights = optax.apply_updates(params.weights, updates)
        if averaged is not None:
            averaged = optax.incremental_update(weights, averaged, ema_share(step, cfg.optimizer.ema))
        stepped = TrainState(dataclasses.replace(params, weights=weights), opt_state, averaged)
        return stepped, StepReport(loss, wrong, optax.tree.norm(grads), is_finite(seen.queries, seen.keys))

    def step_own_layers(state: TrainState, captured: Captured, layer_keys: Array) -> tuple[TrainState, StepReport]:
        at_once = min(cfg.layers_at_once, layer_keys.shape[0])
        return jax.lax.map(step_layer, (state, captured, layer_keys), batch_size=at_once)

    layers = captured.picks.shape[0]
    layer_keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(layers))
    return jax.shard_map(
        step_own_layers, mesh=cfg.mesh, in_specs=(P(AXIS), P(AXIS), P(AXIS)), out_specs=P(AXIS), check_vma=False
    )(state, captured, layer_keys)


def spread_state(state: TrainState, layers: int, mesh: Mesh) -> TrainState:
    """Return the state of `layers` layers on the mesh, the last layer repeated where the mesh does not divide them."""
    missing = padded_layers(layers, mesh) - layers
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * missing]) if missing else leaf, state)
    return put(padded, NamedSharding(mesh, P(AXIS)))


@jax.jit
def is_finite(*arrays: Array) -> Bool[Array, ""]:
    """Whether no number of any array is NaN or infinite."""
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


def gather_state(state: TrainState, layers: int) -> TrainState:
    """Return the state without repeated layers, as it is saved."""
    return jax.tree.map(lambda leaf: leaf[:layers], state)
