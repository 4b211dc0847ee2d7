"""What a training run is: its flags and its presets."""

import dataclasses
import math
from typing import Any, Literal

from spotlight_jax.config.data import DataConfig
from spotlight_jax.config.hashing import FORMS, NetworkConfig, TransformConfig
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.ranking import LOSSES, MassLoss, PairLoss
from spotlight_jax.config.selection import DENSE_LAYERS, SelectionConfig
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on each layer by itself: its own gradient clip, warm-up, then cosine decay to zero."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises from zero."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.98
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of one layer's gradient."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights; it is what is evaluated and exported (0: the weights)."""

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        check_numbers(self)
        self._check_above_0("learning_rate", "clip")
        self._check_share("warmup")
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a decay from 0 to below 1, such as 0.99")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay}; give 0 or more")

    def _check_above_0(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0")

    def _check_share(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise InputError(f"{name} is {getattr(self, name)}; give a share of the steps from 0 to 1")


@dataclasses.dataclass(frozen=True)
class AnnealedOptimizerConfig(OptimizerConfig):
    """The same for networks, whose bits are soft signs while they are trained."""

    gamma_start: float = 4.0
    """Sharpness of the soft sign at the first step."""
    gamma_end: float = 64.0
    """Sharpness from the end of the annealing on (the paper: 64 throughout)."""
    anneal: float = 0.7
    """Share of the steps over which gamma grows, geometrically; 0 means gamma_end throughout."""

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        super().__post_init__()
        self._check_above_0("gamma_start", "gamma_end")
        self._check_share("anneal")


Oracle = Literal["scores", "probabilities"]


ORACLES: dict[Oracle, str] = {"scores": "oracle-scores", "probabilities": "oracle-mass"}  # as evaluations call them


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out windows: of what, and when."""

    every: int = 100
    """Steps between two evaluations; the first and the last state are always evaluated."""
    queries: int = 256
    """Queries per held-out window, spread over it."""
    keep: float = 0.02
    """Share of the visible tokens a query reads."""
    per: Literal["kv_head", "query_head"] = "kv_head"
    """One selection for all query heads that share a KV head, or one per query head."""
    oracle: Oracle = "probabilities"
    """What the oracle of a KV head ranks tokens by: its query heads' summed attention probabilities, the most that one
    set can hold (`oracle-mass` in results), or their summed dot products (`oracle-scores`)."""
    dense_layers: tuple[int, ...] = DENSE_LAYERS
    """Layers that decoding reads densely: trained, but not in the means."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        check_numbers(self)
        if self.every < 1 or self.queries < 1:
            raise InputError(f"evaluate every {self.every} steps with {self.queries} queries; give at least 1 of each")
        _ = self.selection  # refuses what selects nothing

    @property
    def selection(self) -> SelectionConfig:
        """The rule of selection, bare: no sinks, no window of recent tokens."""
        return SelectionConfig(keep=self.keep, per=self.per, dense_layers=self.dense_layers)


@dataclasses.dataclass(frozen=True)
class TailConfig:
    """Training of the corrections of the tail, after the last step."""

    windows: int = 6
    """Windows of the training text that the corrections are trained on; 0: the selector estimates nothing."""
    queries: int = 128
    """Queries per window."""
    steps: int = 250
    """Optimiser steps."""
    learning_rate: float = 0.05
    """Learning rate of Adam, falling to 0 by a cosine."""

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        check_numbers(self)
        if self.windows < 0 or self.queries < 1 or self.steps < 1 or self.learning_rate <= 0:
            raise InputError("tail needs at least 1 query and 1 step, a learning rate above 0, and 0 windows or more")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other. Under Slurm or Open MPI they need no flags."""

    coordinator: str | None = None
    """HOST:PORT of the first process, the same for all."""
    num_processes: int | None = None
    """Processes of the run, as a rule one on each host."""
    process_id: int | None = None
    """Number of this process, from 0."""
    timeout: int = 300
    """Seconds to wait for the others."""

    def __post_init__(self) -> None:
        """Refuse what names no process."""
        check_numbers(self)
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(value is not None for value in given) and None in given:
            raise InputError("--distributed needs all of coordinator, num-processes and process-id, or none of them")
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise InputError(
                f"--distributed.process-id is {self.process_id} of {self.num_processes} processes; count from 0"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"--distributed.coordinator is {self.coordinator}; give HOST:PORT")
        if self.timeout < 1:
            raise InputError(f"--distributed.timeout is {self.timeout}; give at least 1 second")


_AT_LEAST_ONE = (
    "length_step",
    "steps",
    "fit_windows",
    "steps_per_window",
    "layers_at_once",
    "save_every",
    "keep_checkpoints",
)


@dataclasses.dataclass(frozen=True)
class LayerwiseConfig:
    """Train the hash functions of every layer of a frozen model."""

    preset: Literal["default", "demo", "paper"] = "default"
    """Starting values of all other flags: `default` (our recipe, needs a GPU), `demo` (the same recipe, small enough
    for two CPU cores), `paper` (Spotlight Attention as published)."""
    model: str = "smollm2-135m"
    """Base model: a folder in Hugging Face's layout, a hub id, a .gguf file, or smollm2-135m (fetched once)."""
    out: str | None = None
    """Run folder; without it, a new one under runs/."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with the flags it was started with."""
    dry_run: bool = False
    """Compile one step, print peak memory, time per step and time to finish, and stop."""
    length: int | Literal["context", "window"] = "context"
    """Tokens of the longest sequence that the selector is meant for: windows stand anywhere below it, so that codes fit
    keys at every position. context: the model's own, stretched by its RoPE scaling; window: the window's."""
    length_step: int = 4
    """Hash functions of their own for sequences up to the window, up to about this many times as long, and so on to
    --length, since what is fitted to long contexts is worse in short ones; a sequence's final length says which are
    used. 1: the same ones for all lengths."""
    steps: int = 200
    """Optimiser steps."""
    fit_windows: int = 8
    """Windows of the training text that hash functions are fitted to before the first step: axes of keys (transform
    form), or their mean and scale."""
    steps_per_window: int = 1
    """Steps taken on each window of text, each with queries and samples of its own: a forward pass saved."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(window=8192))
    hash: TransformConfig | NetworkConfig = TransformConfig()
    ranking: MassLoss | PairLoss = MassLoss(target="kv_head")
    optimizer: OptimizerConfig | AnnealedOptimizerConfig = OptimizerConfig(learning_rate=1e-2)
    measure: EvaluationConfig = EvaluationConfig()
    tail: TailConfig = TailConfig()
    layers_at_once: int = 1
    """Layers whose loss each device works on together: higher is faster on a GPU and uses more memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen model's weights; auto: bfloat16 on an accelerator, float32 on a CPU."""
    weights: Literal["device", "sharded", "host", "disk"] = "device"
    """Where the frozen model lies: whole on each device; spread over all devices, which gather a layer at a time; in
    the host's memory, or in its files, one layer at a time on the device. The last two are for models that do not fit
    otherwise: slower, which more --steps-per-window make up for."""
    mesh: tuple[str, ...] = ()
    """Devices by axis: model=2 splits the frozen model's heads and widths, data=2 passes two windows at once; steps are
    taken by layers, on all of them. Without it, every device passes windows of its own."""
    distributed: DistributedConfig = DistributedConfig()
    cache_dir: str | None = None
    """Write the hidden states of all layers here once and train from them, as the paper does; without it, no disk."""
    cache_gib: float = 100.0
    """Most disk the cache may take; a run that needs more fills it several times."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    track: Literal["none", "tensorboard", "trackio"] = "none"
    """Also send metrics to TensorBoard or trackio (pip install 'spotlight-jax[track]')."""
    seed: int = 0
    """Seed of the initial weights and of all sampling; the order of the text has its own, --data.seed."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        check_numbers(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        window = self.data.window
        if isinstance(self.length, int) and self.length < window:
            raise InputError(f"length is {self.length}, less than the {window} tokens of a window; raise it")
        for what, count in (("ranking.queries", self.ranking.queries), ("measure.queries", self.measure.queries)):
            if count > window:
                raise InputError(f"{what} is {count}, more than the {window} tokens of a window; lower it")
        if self.resume and self.out is None:
            raise InputError("--resume needs the run's folder: add --out RUN_FOLDER")
        if self.data.held_out_windows < 1:
            raise InputError("data.held_out_windows is 0; training needs at least 1 window to evaluate on")
        if "kv_head" in self.ranking.targets and self.hash.code_heads != "kv":
            given = f"--ranking.target {self.ranking.target}"
            raise InputError(f"{given} sums scores of one key code; give --ranking.target query_head")
        self._check_mesh()
        if self.cache_dir is None and self.cache_gib != LayerwiseConfig.cache_gib:
            raise InputError("--cache-gib is about hidden states on disk; give --cache-dir")
        if self.cache_gib <= 0:
            raise InputError(f"cache_gib is {self.cache_gib}; give the GiB of disk the cache may take")

    def _check_mesh(self) -> None:
        """Refuse a mesh that splits tokens, and weights or hidden states that lie where a mesh does not split them."""
        sizes = parse_mesh(self.mesh)
        if "context" in sizes:
            raise InputError("--mesh context splits what decoding caches; train with axes model and data")
        if sizes and self.weights != "device":
            raise InputError(f"--mesh says where weights lie; leave out --weights {self.weights}, or --mesh")
        if sizes and self.cache_dir is not None:
            raise InputError("--cache-dir keeps hidden states of whole windows by device; leave out --mesh, or it")


def with_recipe(base: LayerwiseConfig, form: str, loss: str) -> LayerwiseConfig:
    """Return a config with hash functions of this form and this loss: what both kinds have stays as it is."""
    is_network = FORMS[form] is NetworkConfig
    own_codes = {"code_heads": "kv"} if form == "asymmetric" else {}
    return dataclasses.replace(
        base,
        hash=_recast(base.hash, FORMS[form], form=form, **own_codes),
        ranking=_recast(base.ranking, LOSSES[loss], loss=loss),
        optimizer=_recast(base.optimizer, AnnealedOptimizerConfig if is_network else OptimizerConfig),
    )


def _recast(cfg: Any, kind: type, **changes: Any) -> Any:
    """Return a config of another class with the fields that it shares with this one."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(cfg).items() if name in names} | changes)


def lengths_covered(cfg: LayerwiseConfig, model: DecoderConfig) -> tuple[int, ...]:
    """Return the tokens of the longest sequence that each of a run's sets of hash functions is for, ascending.

    The first is a window, the last `--length`, and each about `--length-step` times the one before it.

    Raises: InputError where one passes the model's context.
    """
    named = {"context": model.max_context, "window": cfg.data.window}
    length = named[cfg.length] if isinstance(cfg.length, str) else cfg.length
    window, context = cfg.data.window, model.max_context
    if window > context:
        raise InputError(f"--data.window {window} is more than the {context} tokens of '{cfg.model}'")
    if length > context:
        raise InputError(f"--length {length} is more than the {context} tokens of '{cfg.model}'")
    if cfg.length_step == 1 or length == window:
        return (length,)
    steps = max(1, round(math.log(length / window) / math.log(cfg.length_step)))
    return tuple(round(window * (length / window) ** (step / steps)) for step in range(steps + 1))


PRESETS = {
    "default": LayerwiseConfig(),
    "demo": LayerwiseConfig(
        preset="demo",
        length_step=1,
        steps=8,
        steps_per_window=2,
        fit_windows=4,
        data=DataConfig(window=2048, held_out_windows=4),
        measure=EvaluationConfig(every=8, queries=128),
        tail=TailConfig(windows=4, queries=64, steps=100, learning_rate=0.1),
        save_every=8,
    ),
    "paper": LayerwiseConfig(
        preset="paper",
        length="window",
        steps=8192,
        data=DataConfig(window=8192),
        hash=NetworkConfig("symmetric", skip="none", code_heads="query", centre=False),
        ranking=PairLoss(
            top_rule="total",
            min_top=1,
            queries=1024,
            tops=1024,
            others=1024,
            always_top=0,
            weighting="uniform",
        ),
        optimizer=AnnealedOptimizerConfig(learning_rate=1e-3, gamma_start=64.0, anneal=0.0),
        measure=EvaluationConfig(per="query_head", every=512),
        tail=TailConfig(windows=0),
        save_every=256,
    ),
}
