"""What a run is and what it will take, before anything is loaded: windows, steps, memory, disk."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from spotlight_jax.config.mesh import describe_mesh, parse_mesh
from spotlight_jax.config.ranking import PairLoss
from spotlight_jax.config.selection import check_layers
from spotlight_jax.errors import InputError
from spotlight_jax.generation import head_shape
from spotlight_jax.memory import GIB, available_bytes
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.models.load import load_config
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.sharding import bytes_per_device, open_mesh
from spotlight_jax.selector.base import HashFunctions, HeadShape
from spotlight_jax.selector.forms import check_widths, init_functions
from spotlight_jax.selector.losses.targets import most_top
from train.capture import Captured, make_mesh, padded_layers, windows_axis
from train.config import LayerwiseConfig, lengths_covered
from train.hidden_cache import CachePlan, plan_cache
from train.step import StepConfig, init_state, train_step
from train.track import check_tracker

_MOST_KEPT = 4  # windows that stay captured; more would take more memory than the rest of a run


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's config and what follows from it and from the model's: nothing here changes while it trains."""

    cfg: LayerwiseConfig
    model: DecoderConfig
    dtype: np.dtype
    lengths: tuple[int, ...]  # tokens of the longest sequence that each set of hash functions is for, ascending
    mesh: Mesh  # of all devices, which take steps by layers
    disk: CachePlan | None  # of hidden states
    split: Mesh | None = None  # the same devices as the frozen model is split over them; None: it is not

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that the selector is for."""
        return self.lengths[-1]

    @property
    def shape(self) -> HeadShape:
        """The model's heads."""
        return head_shape(self.model)

    @property
    def rows(self) -> int:
        """Rows of the state: all layers for one length after another."""
        return len(self.lengths) * self.shape.layers

    @property
    def forward_mesh(self) -> Mesh:
        """What windows pass the frozen model on."""
        return self.mesh if self.split is None else self.split

    @property
    def windows_at_once(self) -> int:
        """Windows that pass the frozen model together."""
        return self.forward_mesh.shape[windows_axis(self.forward_mesh)]

    @property
    def windows_kept(self) -> int:
        """First windows whose queries and keys stay in memory from the fit until their steps.

        On a CPU a forward pass takes seconds and its memory is the machine's; a GPU passes them again, and what is on
        disk is read again.
        """
        if self.disk is not None or jax.default_backend() != "cpu":
            return 0
        windows = -(-self.cfg.steps // self.cfg.steps_per_window)
        return min(self.cfg.fit_windows, windows, _MOST_KEPT)

    @property
    def step_cfg(self) -> StepConfig:
        """All that shapes a step."""
        cfg = self.cfg
        return StepConfig(cfg.ranking, cfg.optimizer, cfg.steps, cfg.layers_at_once, self.mesh)

    @functools.cached_property
    def keys(self) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
        """For the initial weights, the sampled queries, and the steps."""
        with jax.ensure_compile_time_eval():  # kept: they must be numbers, also where a trace asks first
            init, feed, step = jax.random.split(jax.random.key(self.cfg.seed), 3)
        return init, feed, step

    def init_hashes(self) -> HashFunctions:
        """Hash functions of all rows before anything is known of keys."""
        return init_functions(self.keys[0], self.cfg.hash, dataclasses.replace(self.shape, layers=self.rows))

    def layer_name(self, row: int) -> str:
        """Name a row of the state: a layer as the params tree names it, and the length where there are several."""
        place, own = divmod(row, self.shape.layers)
        return f"layer_{own}" + (f" (up to {self.lengths[place]:,} tokens)" if len(self.lengths) > 1 else "")


def plan_run(cfg: LayerwiseConfig) -> Plan:
    """Plan a run; raises InputError where config and model do not go together."""
    model, dtype = load_config(cfg.model), resolve_dtype(cfg.dtype)
    lengths = lengths_covered(cfg, model)
    check_tracker(cfg.track)
    check_widths(cfg.hash, head_shape(model))
    check_layers(cfg.measure.dense_layers, model.layers)
    if set(range(model.layers)) <= set(cfg.measure.dense_layers):
        raise InputError(f"all {model.layers} layers of '{cfg.model}' are in --measure.dense-layers; leave some out")
    split = open_split(cfg, model)
    disk = None
    if cfg.cache_dir is not None:
        windows = -(-cfg.steps // cfg.steps_per_window)
        disk = plan_cache(model, dtype, cfg.data.window, windows, cfg.cache_gib, ranges=len(lengths))
    return Plan(cfg, model, dtype, lengths, make_mesh(split), disk, split)


def open_split(cfg: LayerwiseConfig, model: DecoderConfig) -> Mesh | None:
    """Open the mesh that the frozen model is split over; None without `--mesh`.

    Raises: InputError for one that this model or these machines cannot have.
    """
    sizes = parse_mesh(cfg.mesh)
    if not sizes:
        return None
    mesh, devices = open_mesh(sizes, model, rest="data"), len(jax.devices())
    if mesh is None:
        raise InputError(f"--mesh {describe_mesh(sizes)} is a single device; leave it out")
    if jax.process_count() > 1 and mesh.size < devices:
        raise InputError(
            f"--mesh {describe_mesh(sizes)} is {mesh.size} devices, and the processes have {devices}; give all"
        )
    return mesh


def compiled_step_bytes(plan: Plan) -> int:
    """Return the temporary bytes of one compiled step, by the compiler's own account, before anything is loaded."""
    cfg, model, layers = plan.cfg, plan.model, padded_layers(plan.rows, plan.mesh)
    params = jax.eval_shape(plan.init_hashes)
    state = jax.eval_shape(lambda p: init_state(p, cfg.optimizer, cfg.steps), params)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype), state)
    count = cfg.ranking.queries
    spec: Any = jax.ShapeDtypeStruct  # stands for an array where only its shape is read
    captured = Captured(
        queries=spec((layers, count, model.q_heads, model.head_dim), plan.dtype),
        picks=spec((layers, count), jnp.int32),
        keys=spec((layers, cfg.data.window, model.kv_heads, model.head_dim), plan.dtype),
    )
    lowered = train_step.lower(state, jax.random.key(0), jnp.int32(0), captured, plan.step_cfg)
    analysis = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def estimate_memory(plan: Plan) -> dict[str, int]:
    """Return the bytes per device of the large parts of a step; the flags that bound each are its name's suffix."""
    cfg, model, devices = plan.cfg, plan.model, plan.mesh.size
    layers = -(-plan.rows // devices)  # of hash functions: each length has its own
    at_a_time = plan.windows_at_once
    window, ranking, size = cfg.data.window, cfg.ranking, plan.dtype.itemsize
    shapes = param_shapes(model, plan.dtype)
    whole, layer = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept)) for kept in (shapes, shapes["layer_0"])
    )
    name, weights = "one layer of the frozen model", layer * size
    if cfg.weights == "device" or (cfg.weights == "host" and jax.default_backend() == "cpu"):  # whose host it is
        name, weights = "frozen model", whole * size
    if plan.split is not None:
        name, weights = "frozen model's share", bytes_per_device(shapes, plan.split)
    elif cfg.weights == "sharded":
        name, weights = "frozen model's share and one layer", (-(-whole // devices) + layer) * size
    kept = max(at_a_time, plan.windows_kept)
    keys = window * model.kv_heads * model.head_dim * size
    queries = ranking.queries * model.q_heads * model.head_dim * size
    captured = keys + cfg.steps_per_window * queries
    code_heads, _ = cfg.hash.code_shape(model.q_heads, model.kv_heads)
    at_once = min(ranking.queries_at_once, ranking.queries)
    rows = model.q_heads * at_once
    scores, tops = (3, min(ranking.tops, most_top(window, ranking))) if isinstance(ranking, PairLoss) else (6, 0)
    loss = (
        cfg.layers_at_once
        * 4
        * (
            scores * rows * window  # true scores and learned ones, sorted for their top
            + 4 * code_heads * window * cfg.hash.code_bits  # soft codes and their gradients
            + 2 * rows * tops * cfg.hash.code_bits  # codes of the sampled top keys
        )
    )
    one_layer = dataclasses.replace(plan.shape, layers=1)
    trained = jax.eval_shape(lambda: jax.tree.leaves(init_functions(jax.random.key(0), cfg.hash, one_layer).weights))
    hashes = sum(math.prod(leaf.shape) for leaf in trained)
    held_out = cfg.data.held_out_windows * (keys + cfg.measure.queries * model.q_heads * model.head_dim * size)
    return {
        name: weights,
        "queries and keys of windows (--data.window, --fit-windows)": layers * kept * captured,
        "held-out windows (--data.held-out-windows)": -(-model.layers // devices) * held_out,
        "loss (--layers-at-once, --ranking.queries-at-once)": loss,
        "hash functions and AdamW's moments": (4 if cfg.optimizer.ema else 3) * 4 * layers * hashes,
    }


def check_memory(plan: Plan) -> None:
    """Raise InputError where a run does not fit a CPU's memory, or the model a GPU's, which refuses the rest itself."""
    device = jax.local_devices()[0]
    free, parts = available_bytes(device), estimate_memory(plan)
    need, weights = sum(parts.values()), next(iter(parts.values()))
    if device.platform != "cpu":
        if free is not None and weights > free:
            others = [where for where in ("sharded", "host", "disk") if where != plan.cfg.weights]
            more = "" if plan.split is None else "more devices along model of --mesh, or without it "
            raise InputError(
                f"the weights take {weights / GIB:.1f} GiB of each device and {free / GIB:.1f} GiB are free; give "
                f"{more}--weights {' or '.join(others)}, or a smaller model"
            )
        return
    if free is not None and need > free:
        narrower = "--dtype bfloat16, " if plan.dtype.itemsize > 2 else ""
        raise InputError(
            f"this takes about {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; take a smaller model, {narrower}"
            "or lower --data.window, --data.held-out-windows or --layers-at-once"
        )


def _describe_lengths(lengths: tuple[int, ...]) -> str:
    """Return what positions are trained for."""
    if len(lengths) == 1:
        return f"positions up to {lengths[0]:,} tokens"
    return f"hash functions each for sequences up to {', '.join(f'{length:,}' for length in lengths)} tokens"


def describe(plan: Plan) -> list[str]:
    """Return the plan, a line each."""
    cfg, model, devices, memory = plan.cfg, plan.model, jax.devices(), estimate_memory(plan)
    windows = -(-cfg.steps // cfg.steps_per_window)
    where = f", mesh {describe_mesh(parse_mesh(cfg.mesh))}, windows at once: {plan.windows_at_once}" if cfg.mesh else ""
    lines = [
        f"model     {cfg.model}: {model.layers} layers, {model.q_heads} query / {model.kv_heads} KV heads x "
        f"{model.head_dim}, {plan.dtype.name}",
        f"hash      {cfg.hash.describe()}",
        f"text      {', '.join(cfg.data.train)}: {windows} window{'s' * (windows != 1)} of {cfg.data.window} tokens, "
        f"{windows * cfg.data.window:,} in all; {cfg.data.held_out_windows} held out",
        f"length    {_describe_lengths(plan.lengths)}",
        f"steps     {cfg.steps}, {cfg.steps_per_window} per window, {cfg.ranking.queries} queries each",
        f"device    {plan.mesh.size} x {devices[0].device_kind}{where}",
        f"memory    about {sum(memory.values()) / GIB:.1f} GiB per device: "
        + "; ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items()),
    ]
    if disk := plan.disk:
        lines.append(
            f"disk      {disk.disk_bytes / GIB:.2f} GiB of hidden states in {cfg.cache_dir}, {disk.windows_at_once} of "
            f"{disk.windows} windows at a time"
        )
    return lines
