"""One training run: its state, complete once a `Trainer` is made, and the operations that the loop is made of."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax import runs
from spotlight_jax.display import Display
from spotlight_jax.errors import InputError
from spotlight_jax.metrics import SelectionQuality, spread_positions
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.networks import orthogonal_lsh
from train.capture import Captured, capture
from train.checkpointing import CheckpointStore
from train.config import PRESETS, AnnealedOptimizerConfig, EvaluationConfig
from train.data import Inputs
from train.estimate import Plan
from train.evaluate import evaluate, mean_over_sparse
from train.fit import fit
from train.length import choose_windows, evaluate_far
from train.processes import fetch
from train.step import StepReport, TrainState, gamma_at, gather_state, init_state, is_finite, spread_state, train_step
from train.tail import fit_tail
from train.track import open_tracker

_MODEL_ADVICE = "its weights are damaged, or too large for --dtype bfloat16 (try float32)"
_TUNING = ("--optimizer.", "--ranking.", "--hash.")  # flags that can make a loss diverge


def first_state(inputs: Inputs, display: Display) -> TrainState:
    """Make the state of step 0: hash functions fitted to the first windows, unless fitted before or only timed."""
    plan = inputs.plan
    cfg, hashes = plan.cfg, plan.init_hashes()
    if hashes.fitted_to != "nothing" and not (cfg.resume or cfg.dry_run):
        hashes = fit(hashes, _first_windows(inputs), cfg, functools.partial(display.update, "fitting to windows"))
    return spread_state(init_state(hashes, cfg.optimizer, cfg.steps), plan.rows, plan.mesh)


def _first_windows(inputs: Inputs) -> Iterator[Captured]:
    """Yield what hash functions are fitted to, checked: a NaN in a moment would be in all that follows."""
    for seen in inputs.feed.first_windows(inputs.plan.cfg.fit_windows, inputs.plan.rows):
        _check_finite_keys(seen, "the training text")
        yield seen


class Trainer:
    """A run: `take_step`, `log`, `evaluate`, `save`, and `close`."""

    def __init__(
        self,
        inputs: Inputs,
        state: TrainState,
        folder: runs.RunFolder,
        display: Display,
        beside: "Trainer | None" = None,
    ) -> None:
        """Continue from the newest checkpoint, or evaluate the start of a new run; evaluate LSH in any case.

        Args:
            inputs: model and text.
            state: of step 0, from `first_state`.
            folder: of the run.
            display: where progress is shown.
            beside: another run, on whose held-out windows this one is evaluated too.
        """
        self.plan, self.inputs, self.state, self.folder, self._display = inputs.plan, inputs, state, folder, display
        cfg = self.plan.cfg
        self.step, self.seconds = 0, 0.0
        self.is_far_whole = False  # whether "far" and "far_lsh" are of whole contexts
        self._store = CheckpointStore(folder.path / "checkpoints", cfg.keep_checkpoints, folder.is_written)
        self._track = open_tracker(cfg.track if folder.is_written else "none", folder.path, runs.to_plain(cfg))
        self._held_out: list[Captured] = _capture_held_out(inputs, display) if beside is None else beside._held_out
        # newest evaluation of "trained" and "lsh"; at the far end of the covered positions "far" and "far_lsh"
        self.quality: dict[str, SelectionQuality] = {"lsh": self._evaluate_lsh(beside)}
        if cfg.resume:
            self._resume()
        else:
            self.evaluate()
        # IoU and mass before the first step, of the run's first row
        self.before = next(({"iou": row["iou"], "mass": row["mass"]} for row in folder.metrics() if "iou" in row), None)

    def _evaluate_lsh(self, beside: "Trainer | None") -> SelectionQuality:
        cfg = self.plan.cfg
        other = beside and beside.plan.cfg
        if beside and other and (other.measure, other.hash.code_bits) == (cfg.measure, cfg.hash.code_bits):
            return beside.quality["lsh"]
        self._display.say("evaluating LSH")
        return evaluate(self._lsh(), self._held_out, cfg.measure, cfg.layers_at_once)

    def _lsh(self) -> HashFunctions:
        """Return what the run's hash functions are compared with."""
        return orthogonal_lsh(self.plan.keys[0], self.plan.cfg.hash.code_bits, self.plan.shape)

    def _resume(self) -> None:
        plan, cfg = self.plan, self.plan.cfg
        self.step, state, position, damaged = self._store.load(gather_state(self.state, plan.rows))
        if position["key"] != self._key_data():
            raise InputError("the checkpoint belongs to another seed; resume with the flags the run was started with")
        self.seconds = position["seconds"]
        self.state = spread_state(state, plan.rows, plan.mesh)
        for line in damaged:
            self._display.say(line)
        self.inputs.feed.restore(self.step, position["text"])
        self.folder.keep_metrics_before(self.step + 1)
        self._display.say(f"resumed at step {self.step} of {cfg.steps}")
        if self.step == cfg.steps:  # evaluated and recorded before it was saved
            self._display.say(f"evaluating at step {self.step}")
            self.quality["trained"] = self.quality_by(cfg.measure)

    def _key_data(self) -> list[int]:
        return np.asarray(jax.random.key_data(jax.random.key(self.plan.cfg.seed))).tolist()

    def take_step(self, captured: Captured | None = None) -> StepReport:
        """Take one optimiser step of all layers, on what the feed gives or on what is given."""
        started = time.monotonic()
        captured = self.inputs.feed.at(self.step) if captured is None else captured
        self.state, report = step_once(self.plan, self.state, self.step, captured)
        self.step += 1
        self.seconds += time.monotonic() - started
        return report

    def log(self, step: int, report: StepReport) -> None:
        """Check and record a step's report."""
        started = time.monotonic()
        loss, wrong, norm = check_finite(report, self.plan, step, self.last_checkpoint())
        row = {
            "step": step,
            "loss": float(loss.mean()),
            "wrong": float(wrong.mean()),
            "grad_norm": float(norm.mean()),
            "worst_layer": int(loss.argmax()) % self.plan.shape.layers,
        }
        if isinstance(self.plan.cfg.optimizer, AnnealedOptimizerConfig):
            row["gamma"] = round(float(gamma_at(jnp.int32(step - 1), self.plan.cfg.optimizer, self.plan.cfg.steps)), 3)
        self.folder.append_metrics(row)
        self._track(step, {"loss": row["loss"], "wrong": row["wrong"]})
        what = "of attention mass missed" if self.plan.cfg.ranking.loss == "mass" else "of pairs wrong"
        note = f"loss {row['loss']:.4f}, {100 * row['wrong']:.2f} % {what}"
        if "trained" in self.quality:
            note += f", IoU {self.mean('iou'):.3f} (LSH {self.mean('iou', 'lsh'):.3f})"
        self._display.update("training", step, self.plan.cfg.steps, note)
        self.seconds += time.monotonic() - started

    def evaluate(self) -> None:
        """Evaluate the hash functions on the held-out windows and record it."""
        self._display.say(f"evaluating at step {self.step}")
        self.quality["trained"] = self.quality_by(self.plan.cfg.measure)
        row = {"step": self.step, "iou": self.mean("iou"), "recall": self.mean("recall"), "mass": self.mean("mass")}
        row |= {"iou_lsh": self.mean("iou", "lsh"), "mass_lsh": self.mean("mass", "lsh")}
        row["mass_oracle"] = self.mean("oracle_mass")
        self.folder.append_metrics(row)
        self._track(self.step, {name: value for name, value in row.items() if name != "step"})

    def quality_by(self, cfg: EvaluationConfig) -> SelectionQuality:
        """Return the quality of the hash functions as they are, on the held-out windows."""
        self._check_state()
        hashes = self.hash_functions(self.plan.cfg.data.window)
        return evaluate(hashes, self._held_out, cfg, self.plan.cfg.layers_at_once)

    def hash_functions(self, length: int) -> HashFunctions:
        """Return the hash functions as they are, of all layers, for sequences of `length` tokens."""
        return hash_functions(self.plan, self.state, length)

    def evaluate_length(self) -> None:
        """Evaluate the hash functions, and LSH, at the far end of the positions that they cover, where that is farther
        than a window's."""
        if self.plan.length == self.plan.cfg.data.window:
            return
        size = self.plan.dtype.itemsize
        far = choose_windows(self.inputs.held_out_long, self.inputs.held_out, self.plan.length, self.plan.model, size)
        window, length = self.plan.cfg.data.window, f"{self.plan.length:,}"
        short = f"evaluating windows of {window:,} tokens whose positions reach {length}"
        self._display.say(f"evaluating at {length} tokens" if far.is_whole else short)
        hashes = {"far": self.hash_functions(self.plan.length), "far_lsh": self._lsh()}
        args = far, self.inputs.params, self.plan.model, hashes, self.plan.cfg.measure, self.plan.forward_mesh
        self.quality |= evaluate_far(*args)
        self.is_far_whole = far.is_whole

    def fit_tails(self, sets: list[HashFunctions]) -> "TailFit":
        """Give the hash functions for each length their corrections of the tail; see `correct_tails`."""
        cfg = self.plan.cfg
        return correct_tails(self.inputs, sets, -(-cfg.steps // cfg.steps_per_window), self._display)

    def save(self, is_awaited: bool = False) -> None:
        """Checkpoint in the background, or have it on disk before this returns."""
        self._check_state()
        position = {"text": self.inputs.feed.position(self.step), "key": self._key_data(), "seconds": self.seconds}
        self._store.save(self.step, gather_state(self.state, self.plan.rows), position)
        if is_awaited:
            self._store.wait()

    def _check_state(self) -> None:
        """Raise InputError where the state is not finite: it is neither evaluated, nor saved, nor exported."""
        numbers = [leaf for leaf in jax.tree.leaves(self.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not is_finite(*numbers):
            raise InputError(
                f"the hash functions are not finite after step {self.step}; {_describe_kept(self.last_checkpoint())}; "
                "lower --optimizer.learning-rate or --optimizer.weight-decay and start again"
            )

    def close(self) -> None:
        """Wait until everything is on disk; may be called again."""
        self._store.close()

    def mean(self, what: str, which: str = "trained") -> float:
        """Return the mean of a quality over heads and the layers that select."""
        return mean_over_sparse(getattr(self.quality[which], what), self.plan.cfg.measure.dense_layers)

    def last_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, None before there is one."""
        return self._store.latest()


def hash_functions(plan: Plan, state: TrainState, length: int) -> HashFunctions:
    """Return the hash functions of a state, of all layers, for sequences of `length` tokens."""
    place = sum(length > covered for covered in plan.lengths[:-1])
    own = slice(place * plan.shape.layers, (place + 1) * plan.shape.layers)
    return jax.tree.map(lambda leaf: leaf[own], gather_state(state, plan.rows).selector)


@dataclasses.dataclass(frozen=True)
class TailFit:
    """Hash functions with the tail's corrections, and the error of attention outputs with the first length's.

    Errors are squared, relative to dense attention's outputs: means over heads of sparse layers and budgets.
    """

    sets: list[HashFunctions]  # one for each length
    before: float  # error without the tail
    after: float
    curve: list[float]  # error by step


def correct_tails(inputs: Inputs, sets: list[HashFunctions], first: int, display: Display) -> TailFit:
    """Give the hash functions for each length their corrections of the tail.

    Args:
        inputs: model and text.
        sets: hash functions for one length after another.
        first: number of the first window that the corrections are trained on.
        display: where progress is shown.
    """
    cfg, layers, found, errors, curves = inputs.plan.cfg, inputs.plan.shape.layers, [], [], []
    for place, functions in enumerate(sets):
        rows = []
        for row in fit_tail(inputs, functions, place, first, cfg.tail):
            rows.append(row)
            display.update("correcting the tail", place * layers + len(rows), len(sets) * layers)
        tail = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _, _ in rows))
        found.append(dataclasses.replace(functions, tail=tail))
        errors.append(np.stack([error for _, error, _ in rows]))
        curves.append(np.stack([curve for _, _, curve in rows]))
    sparse = [layer for layer in range(layers) if layer not in cfg.measure.dense_layers]
    before, after = errors[0][sparse].mean(axis=(0, 2))
    return TailFit(found, float(before), float(after), curves[0][sparse].mean(axis=0).tolist())


def make_selector(plan: Plan, sets: list[HashFunctions], **info: Any) -> Selector:
    """Make what is exported of a run: its hash functions for one length after another, `info` with the recipe."""
    return Selector(
        shape=plan.shape,
        params=sets[-1],
        base_model=plan.cfg.model,
        info={"recipe": runs.to_plain(plan.cfg), **info},
        positions=plan.length,
        shorter=tuple(zip(plan.lengths[:-1], sets[:-1], strict=True)),
    )


def step_once(plan: Plan, state: TrainState, step: int, captured: Captured) -> tuple[TrainState, StepReport]:
    """Take one optimiser step of all layers; the state is given up."""
    key = jax.random.fold_in(plan.keys[2], step)
    state, report = train_step(state, key, jnp.int32(step), captured, plan.step_cfg)
    if jax.default_backend() == "cpu":
        jax.block_until_ready(report)  # run-ahead only takes the cores from the step before
    return state, report


def _capture_held_out(inputs: Inputs, display: Display) -> list[Captured]:
    """Capture queries and keys of the held-out windows, kept for all evaluations."""
    plan = inputs.plan
    tokens, at_once, seen = inputs.held_out, plan.windows_at_once, []
    window = plan.cfg.data.window
    picks, positions = spread_positions(window, plan.cfg.measure.queries), np.arange(window, dtype=np.int32)
    places, at = (jnp.asarray(np.tile(row, (at_once, 1))) for row in (positions, picks))
    for first in range(0, len(tokens), at_once):
        numbers = np.minimum(np.arange(first, first + at_once), len(tokens) - 1)
        captured = capture(inputs.params, jnp.asarray(tokens[numbers]), places[None], at, plan.model, plan.forward_mesh)
        for index in range(min(at_once, len(tokens) - first)):
            seen.append(jax.tree.map(lambda leaf: leaf[: plan.shape.layers, index], captured))  # noqa: B023
            _check_finite_keys(seen[-1], "the held-out text")
        display.update("held-out windows", min(first + at_once, len(tokens)), len(tokens))
    return seen


def check_finite(
    report: StepReport, plan: Plan, step: int, kept: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each layer's loss, share that is wrong and gradient norm; stops the run where a loss is not a number.

    Args:
        step: that it is the report of.
        kept: step of the newest checkpoint.

    Raises: InputError that names what is at fault: the model, the flags that differ from the preset, or the rate.
    """
    rows = plan.rows
    report = fetch(report)
    loss, wrong, norm = (np.asarray(leaf)[:rows] for leaf in (report.loss, report.wrong, report.grad_norm))
    bad = np.flatnonzero(~(np.isfinite(loss) & np.isfinite(norm)))
    if len(bad):
        what = (
            f"the loss of {plan.layer_name(int(bad[0]))} is {loss[bad[0]]} before step {step}; {_describe_kept(kept)}"
        )
        if not np.asarray(report.is_input_finite)[:rows].all():
            raise InputError(f"{what}; the model itself gives keys or queries that are not finite: {_MODEL_ADVICE}")
        own = [name for name in runs.differences(plan.cfg, PRESETS[plan.cfg.preset]) if name.startswith(_TUNING)]
        if own:
            raise InputError(f"{what}; start again with {', '.join(own)} nearer to what the preset has")
        raise InputError(f"{what}; lower --optimizer.learning-rate or --optimizer.gamma-end and start again")
    return loss, wrong, norm


def _describe_kept(checkpoint: int | None) -> str:
    return f"checkpoint {checkpoint} is kept" if checkpoint is not None else "there is no checkpoint yet"


def _check_finite_keys(seen: Captured, what: str) -> None:
    """Raise InputError where the model gives keys or queries that are not finite."""
    if not is_finite(seen.queries, seen.keys):
        raise InputError(f"the model gives keys or queries that are not finite on {what}: {_MODEL_ADVICE}")
