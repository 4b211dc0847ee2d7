"""One training run in memory: model, text, state, and the operations that the loop is made of."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spotlight_jax import runs, text_files
from spotlight_jax.config.selection import check_layers
from spotlight_jax.data import open_windows
from spotlight_jax.display import Display
from spotlight_jax.errors import InputError
from spotlight_jax.generate import head_shape
from spotlight_jax.memory import GIB
from spotlight_jax.metrics import SelectionQuality, spread_positions
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.load import load_config, load_weights, open_tokenizer
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.forms import check_widths, init_functions
from spotlight_jax.selector.networks import orthogonal_lsh
from train import hidden_cache, plan
from train.capture import Captured, capture, make_mesh, padded_layers
from train.config import PRESETS, LayerwiseConfig, MeasureConfig, lengths_covered
from train.feed import Feed, FeedConfig
from train.fit import fit
from train.length import choose_windows, measure_far
from train.measure import mean_over_sparse, measure
from train.states import StateStore
from train.step import (
    StepConfig,
    StepReport,
    gamma_at,
    gather_state,
    init_state,
    is_finite,
    spread_state,
    train_step,
)
from train.track import check_tracker, open_tracker

_MODEL_ADVICE = "its weights are damaged, or too large for --dtype bfloat16 (try float32)"
_TUNING = ("--optimizer.", "--ranking.", "--hash.")  # flags that can make a loss diverge


class Session:
    """A run: `prepare`, `start` (not in a dry run), then `take_step`, `log`, `measure`, `save`, and `close`."""

    def __init__(self, cfg: LayerwiseConfig, display: Display) -> None:
        self.cfg, self._display = cfg, display
        self.model_cfg = load_config(cfg.model)
        self.lengths = lengths_covered(cfg, self.model_cfg)
        self.length = self.lengths[-1]
        self.dtype = resolve_dtype(cfg.dtype)
        self.shape = head_shape(self.model_cfg)
        self.rows = len(self.lengths) * self.shape.layers  # of the state: all layers for one length after another
        check_tracker(cfg.track)
        check_widths(cfg.hash, self.shape)
        check_layers(cfg.measure.dense_layers, self.shape.layers)
        if set(range(self.shape.layers)) <= set(cfg.measure.dense_layers):
            raise InputError(
                f"all {self.shape.layers} layers of '{cfg.model}' are in --measure.dense-layers; leave some out"
            )
        self.mesh = make_mesh()
        self._cache_plan = self._plan_cache()
        for line in plan.describe(cfg, self.model_cfg, self.dtype, self._disk_line()):
            display.say(line)
        base_key = jax.random.key(cfg.seed)
        self._init_key, self._feed_key, self._step_key = jax.random.split(base_key, 3)
        self._key_data = np.asarray(jax.random.key_data(base_key)).tolist()
        self.step, self.seconds = 0, 0.0
        self.step_cfg = StepConfig(cfg.ranking, cfg.optimizer, cfg.steps, cfg.layers_at_once, self.mesh)
        self.feed: Feed  # this and the next after `prepare`
        self._held_out_tokens: np.ndarray
        self._held_out_long: np.ndarray
        self._held_out: list[Captured]  # after `start`
        # newest measurement of "trained" and "lsh"; at the far end of the covered positions "far" and "far_lsh"
        self.quality: dict[str, SelectionQuality] = {}
        self.is_far_whole = False  # whether those are of whole contexts
        self.before: dict[str, float] | None = None  # IoU and mass before the first step, of the run's first row

    @property
    def folder_path(self) -> pathlib.Path:
        """The run's folder."""
        return self._folder.path

    def prepare(self, beside: "Session | None" = None) -> None:
        """Load the model and the text, and make the state of step 0.

        Args:
            beside: a prepared session of the same model, whose weights this one shares, and its windows and forward
                passes where text and seed are the same.
        """
        cfg = self.cfg
        if beside is None:
            self._params = self._load_params()
        else:
            self._params = beside._params
        own = cfg.data, cfg.seed, self.lengths
        if beside is not None and (beside.cfg.data, beside.cfg.seed, beside.lengths) == own:
            self.feed = beside.feed
            self._held_out_tokens, self._held_out_long = beside._held_out_tokens, beside._held_out_long
        else:
            self._open_text()
        hashes = self._init_hashes()
        if hashes.fitted_to != "nothing" and not (cfg.resume or cfg.dry_run):  # were fitted, or are only timed
            progress = functools.partial(self._display.update, "fitting to windows")
            hashes = fit(hashes, self._first_windows(), cfg, progress)
        state = init_state(hashes, cfg.optimizer, cfg.steps)
        self.state = spread_state(state, self.rows, self.mesh)

    def _init_hashes(self) -> HashFunctions:
        """Hash functions of all rows before anything is known of keys."""
        return init_functions(self._init_key, self.cfg.hash, dataclasses.replace(self.shape, layers=self.rows))

    def _load_params(self) -> Params:
        """The frozen model: device arrays, or NumPy arrays that a compiled layer takes along as it is called."""
        if self.cfg.weights == "device":
            return jax.device_put(load_weights(self.cfg.model, self.dtype)[1], NamedSharding(self.mesh, P()))
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.tree.map(np.asarray, load_weights(self.cfg.model, self.dtype)[1])

    def _open_text(self) -> None:
        cfg = self.cfg
        is_tokenized = all(text_files.holds_token_ids(source) for source in (*cfg.data.train, *cfg.data.held_out))
        tokenizer = None if is_tokenized else open_tokenizer(cfg.model)
        windows = open_windows(cfg.data, tokenizer, self.model_cfg.vocab, self._display.update, self.length)
        feed_cfg = FeedConfig(
            cfg.data.window, self.lengths, cfg.data.seed, cfg.ranking.queries, cfg.steps_per_window, self.mesh.size
        )
        self._held_out_tokens, self._held_out_long = windows.held_out, windows.held_out_long
        self.feed = Feed(windows, self._capture_function(), self._feed_key, feed_cfg)

    def _first_windows(self) -> Iterator[Captured]:
        """What hash functions are fitted to, checked: a NaN in a moment would be in all that follows."""
        for seen in self.feed.first_windows(self.cfg.fit_windows, self.rows):
            _check_finite_keys(seen, "the training text")
            yield seen

    def start(self, folder: runs.RunFolder, beside: "Session | None" = None) -> None:
        """Continue from the newest checkpoint, or measure and save the start of a new run; measure LSH in any case.

        Args:
            folder: of the run.
            beside: a started session, on whose held-out windows this one is measured too.
        """
        self._folder = folder
        self._store = StateStore(folder.path / "checkpoints", self.cfg.keep_checkpoints)
        self._track = open_tracker(self.cfg.track, folder.path, runs.to_plain(self.cfg))
        self._held_out = self._capture_held_out() if beside is None else beside._held_out
        lsh = orthogonal_lsh(self._init_key, self.cfg.hash.code_bits, self.shape)
        if (
            beside is not None
            and beside.cfg.hash.code_bits == lsh.cfg.code_bits
            and beside.cfg.measure == self.cfg.measure
        ):
            self.quality["lsh"] = beside.quality["lsh"]
        else:
            self._display.say("measuring LSH")
            self.quality["lsh"] = measure(lsh, self._held_out, self.cfg.measure, self.cfg.layers_at_once)
        if self.cfg.resume:
            self._resume()
        else:
            self.measure()
        self.before = next(({"iou": row["iou"], "mass": row["mass"]} for row in folder.metrics() if "iou" in row), None)

    def _resume(self) -> None:
        template = gather_state(self.state, self.rows)
        self.step, state, position, damaged = self._store.load(template)
        if position["key"] != self._key_data:
            raise InputError("the checkpoint belongs to another seed; resume with the flags the run was started with")
        self.seconds = position["seconds"]
        self.state = spread_state(state, self.rows, self.mesh)
        for line in damaged:
            self._display.say(line)
        self.feed.restore(self.step, position["text"])
        self._folder.keep_metrics_before(self.step + 1)
        self._display.say(f"resumed at step {self.step} of {self.cfg.steps}")
        if self.step == self.cfg.steps:  # measured and recorded before it was saved
            self._display.say(f"measuring at step {self.step}")
            self.quality["trained"] = self.quality_by(self.cfg.measure)

    def capture_next(self) -> Captured:
        """What the next step trains on, by a forward pass of its own whatever was captured before."""
        self.feed.forget()
        return self.feed.at(self.step)

    def take_step(self, captured: Captured | None = None) -> StepReport:
        """One optimiser step of all layers, on what the feed gives or on what is given."""
        started = time.monotonic()
        captured = self.feed.at(self.step) if captured is None else captured
        key = jax.random.fold_in(self._step_key, self.step)
        self.state, report = train_step(self.state, key, jnp.int32(self.step), captured, self.step_cfg)
        self.step += 1
        if jax.default_backend() == "cpu":
            jax.block_until_ready(report)  # run-ahead only takes the cores from the step before
        self.seconds += time.monotonic() - started
        return report

    def log(self, step: int, report: StepReport) -> None:
        """Check and record a step's report."""
        started = time.monotonic()
        loss, wrong, norm = check_finite(report, self)
        row = {
            "step": step,
            "loss": float(loss.mean()),
            "wrong": float(wrong.mean()),
            "grad_norm": float(norm.mean()),
            "gamma": round(float(gamma_at(jnp.int32(step - 1), self.cfg.optimizer, self.cfg.steps)), 3),
            "worst_layer": int(loss.argmax()) % self.shape.layers,
        }
        self._folder.append_metrics(row)
        self._track(step, {"loss": row["loss"], "wrong": row["wrong"]})
        what = "of attention mass missed" if self.cfg.ranking.loss == "mass" else "of pairs wrong"
        note = f"loss {row['loss']:.4f}, {100 * row['wrong']:.2f} % {what}"
        if "trained" in self.quality:
            note += f", IoU {self.mean('iou'):.3f} (LSH {self.mean('iou', 'lsh'):.3f})"
        self._display.update("training", step, self.cfg.steps, note)
        self.seconds += time.monotonic() - started

    def measure(self) -> None:
        """Measure the hash functions on the held-out windows and record it."""
        self._display.say(f"measuring at step {self.step}")
        self.quality["trained"] = self.quality_by(self.cfg.measure)
        row = {"step": self.step, "iou": self.mean("iou"), "recall": self.mean("recall"), "mass": self.mean("mass")}
        row |= {"iou_lsh": self.mean("iou", "lsh"), "mass_lsh": self.mean("mass", "lsh")}
        row["mass_oracle"] = self.mean("oracle_mass")
        self._folder.append_metrics(row)
        self._track(self.step, {name: value for name, value in row.items() if name != "step"})

    def quality_by(self, cfg: MeasureConfig) -> SelectionQuality:
        """Quality of the hash functions as they are, on the held-out windows."""
        self._check_state()
        hashes = self.hash_functions(self.cfg.data.window)
        return measure(hashes, self._held_out, cfg, self.cfg.layers_at_once)

    def hash_functions(self, length: int) -> HashFunctions:
        """The hash functions as they are, of all layers, for sequences of `length` tokens."""
        place = sum(length > covered for covered in self.lengths[:-1])
        own = slice(place * self.shape.layers, (place + 1) * self.shape.layers)
        return jax.tree.map(lambda leaf: leaf[own], gather_state(self.state, self.rows).selector)

    def measure_length(self) -> None:
        """Measure the hash functions, and LSH, at the far end of the positions that they cover, where that is farther
        than a window's."""
        if self.length == self.cfg.data.window:
            return
        size = self.dtype.itemsize
        far = choose_windows(self._held_out_long, self._held_out_tokens, self.length, self.model_cfg, size)
        self._display.say(
            f"measuring at {self.length:,} tokens"
            if far.is_whole
            else f"measuring windows of {self.cfg.data.window:,} tokens whose positions reach {self.length:,}"
        )
        lsh = orthogonal_lsh(self._init_key, self.cfg.hash.code_bits, self.shape)
        hashes = {"far": self.hash_functions(self.length), "far_lsh": lsh}
        args = far, self._params, self.model_cfg, hashes, self.cfg.measure, self.mesh
        self.quality |= measure_far(*args)
        self.is_far_whole = far.is_whole

    def save(self, is_awaited: bool = False) -> None:
        """Checkpoint in the background, or have it on disk before this returns."""
        self._check_state()
        position = {"text": self.feed.position(self.step), "key": self._key_data, "seconds": self.seconds}
        self._store.save(self.step, gather_state(self.state, self.rows), position)
        if is_awaited:
            self._store.wait()

    def _check_state(self) -> None:
        """Raise InputError where the state is not finite: it is neither measured, nor saved, nor exported."""
        numbers = [leaf for leaf in jax.tree.leaves(self.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not is_finite(*numbers):
            kept = self.last_checkpoint()
            saved = f"checkpoint {kept} is kept" if kept is not None else "there is no checkpoint yet"
            raise InputError(
                f"the hash functions are not finite after step {self.step}; {saved}; "
                "lower --optimizer.learning-rate or --optimizer.weight-decay and start again"
            )

    def close(self) -> None:
        """Wait until everything is on disk; may be called again, and before `start`."""
        if hasattr(self, "_store"):
            self._store.close()

    def mean(self, what: str, which: str = "trained") -> float:
        """Mean of a quality over heads and the layers that select."""
        return mean_over_sparse(getattr(self.quality[which], what), self.cfg.measure.dense_layers)

    def last_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, None before there is one."""
        store = getattr(self, "_store", None)
        return store.latest() if store is not None else None

    def layer_name(self, layer: int) -> str:
        """A row of the state: a layer as the params tree names it, and the length where there are several."""
        place, own = divmod(layer, self.shape.layers)
        return f"layer_{own}" + (f" (up to {self.lengths[place]:,} tokens)" if len(self.lengths) > 1 else "")

    def compiled_step_bytes(self) -> int:
        """Temporary memory of one compiled step, by the compiler's own account, before anything is loaded."""
        cfg, model = self.cfg, self.model_cfg
        layers = padded_layers(self.rows, self.mesh)
        params = jax.eval_shape(self._init_hashes)
        state = jax.eval_shape(lambda p: init_state(p, cfg.optimizer, cfg.steps), params)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype), state)
        count = cfg.ranking.queries
        spec: Any = jax.ShapeDtypeStruct  # stands for an array where only its shape is read
        captured = Captured(
            queries=spec((layers, count, model.q_heads, model.head_dim), self.dtype),
            picks=spec((layers, count), jnp.int32),
            keys=spec((layers, cfg.data.window, model.kv_heads, model.head_dim), self.dtype),
        )
        lowered = train_step.lower(state, jax.random.key(0), jnp.int32(0), captured, self.step_cfg)
        analysis = lowered.compile().memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 0

    def _capture_held_out(self) -> list[Captured]:
        """Queries and keys of the held-out windows, kept for all measurements."""
        tokens, at_once, seen = self._held_out_tokens, self.mesh.size, []
        window = self.cfg.data.window
        picks, positions = spread_positions(window, self.cfg.measure.queries), np.arange(window, dtype=np.int32)
        places, at = (jnp.asarray(np.tile(row, (at_once, 1))) for row in (positions, picks))
        for first in range(0, len(tokens), at_once):
            numbers = np.minimum(np.arange(first, first + at_once), len(tokens) - 1)
            captured = capture(self._params, jnp.asarray(tokens[numbers]), places[None], at, self.model_cfg, self.mesh)
            for index in range(min(at_once, len(tokens) - first)):
                seen.append(jax.tree.map(lambda leaf: leaf[: self.shape.layers, index], captured))  # noqa: B023
                _check_finite_keys(seen[-1], "the held-out text")
            self._display.update("held-out windows", min(first + at_once, len(tokens)), len(tokens))
        return seen

    def _capture_function(self):
        if self._cache_plan is None:
            return lambda first, tokens, positions, picks: capture(
                self._params, jnp.asarray(tokens), jnp.asarray(positions), picks, self.model_cfg, self.mesh
            )
        identity = hidden_cache.identify(self._params, self.model_cfg, self.cfg.data, self.lengths, self.dtype)
        assert self.cfg.cache_dir is not None
        cache = hidden_cache.HiddenCache(pathlib.Path(self.cfg.cache_dir), self._cache_plan, identity)
        progress = functools.partial(self._display.update, "hidden states to disk")

        def from_disk(first, tokens, positions, picks):
            feed = self.feed
            return hidden_cache.capture_cached(
                cache, self._params, feed.tokens, feed.positions, first, picks, self.model_cfg, self.mesh, progress
            )

        return from_disk

    def _plan_cache(self) -> hidden_cache.CachePlan | None:
        cfg = self.cfg
        if cfg.cache_dir is None:
            return None
        windows = -(-cfg.steps // cfg.steps_per_window)
        args = self.model_cfg, self.dtype, cfg.data.window, windows, cfg.cache_gib
        return hidden_cache.plan_cache(*args, ranges=len(self.lengths))

    def _disk_line(self) -> str | None:
        if self._cache_plan is None:
            return None
        size = self._cache_plan.disk_bytes / GIB
        return (
            f"{size:.2f} GiB of hidden states in {self.cfg.cache_dir}, {self._cache_plan.windows_at_once} of "
            f"{self._cache_plan.windows} windows at a time"
        )


def check_finite(report: StepReport, session: Session) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, share that is wrong and gradient norm of each layer; stops the run where a loss is not a number.

    Raises: InputError that names what is at fault: the model, the flags that differ from the preset, or the rate.
    """
    rows = session.rows
    loss, wrong, norm = (np.asarray(leaf)[:rows] for leaf in (report.loss, report.wrong, report.grad_norm))
    bad = np.flatnonzero(~(np.isfinite(loss) & np.isfinite(norm)))
    if len(bad):
        kept = session.last_checkpoint()
        saved = f"checkpoint {kept} is kept" if kept is not None else "there is no checkpoint yet"
        what = f"the loss of {session.layer_name(int(bad[0]))} is {loss[bad[0]]} before step {session.step}; {saved}"
        if not np.asarray(report.is_input_finite)[:rows].all():
            raise InputError(f"{what}; the model itself gives keys or queries that are not finite: {_MODEL_ADVICE}")
        own = [name for name in runs.differences(session.cfg, PRESETS[session.cfg.preset]) if name.startswith(_TUNING)]
        if own:
            raise InputError(f"{what}; start again with {', '.join(own)} nearer to what the preset has")
        raise InputError(f"{what}; lower --optimizer.learning-rate or --optimizer.gamma-end and start again")
    return loss, wrong, norm


def _check_finite_keys(seen: Captured, what: str) -> None:
    """Raise InputError where the model gives keys or queries that are not finite."""
    if not is_finite(seen.queries, seen.keys):
        raise InputError(f"the model gives keys or queries that are not finite on {what}: {_MODEL_ADVICE}")
