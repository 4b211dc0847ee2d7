"""What a run reads: the frozen model, and windows in order, captured by a forward pass each or from states on disk."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, PRNGKeyArray

from spotlight_jax import text_files
from spotlight_jax.data import Windows, open_windows
from spotlight_jax.display import Display
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.load import load_weights, open_tokenizer, open_weights
from spotlight_jax.models.sharding import weights_on
from train.capture import AXIS, Captured, capture, draw_picks, take_step
from train.estimate import Plan
from train.hidden_cache import HiddenCache, capture_cached, identify
from train.positions import draw_positions

Rows = Int32[np.ndarray, "windows window"]
Places = Int32[np.ndarray, "ranges windows window"]
# (first window, tokens, positions, picks [windows, picks]) -> leaves [ranges * layers, windows, ...]
CaptureWindows = Callable[[int, Rows, Places, Int32[Array, "windows picks"]], Captured]


@dataclasses.dataclass(frozen=True)
class FeedConfig:
    """Settings of a `Feed`: how steps use windows."""

    window: int
    lengths: tuple[int, ...]  # windows are placed below each of them; see `draw_positions`
    seed: int  # of the positions
    queries: int  # per step
    steps_per_window: int
    windows_at_once: int  # captured together: one per device
    windows_kept: int  # first ones that stay as they were captured until their steps; see `Plan.windows_kept`


class Feed:
    """What each step trains on, and the position in the text that a checkpoint needs.

    Which windows are captured together changes nothing but speed: a window's sampled queries come from its number.
    """

    def __init__(self, windows: Windows, capture: CaptureWindows, key: PRNGKeyArray, cfg: FeedConfig) -> None:
        self._windows = windows
        self._capture = capture
        self._key = key
        self._cfg = cfg
        self._first = 0  # number of the first window that is drawn and not dropped
        self._drawn: list[tuple[dict[str, Any], np.ndarray]] = []  # position before the window, its tokens
        self._round: tuple[int, int, Captured] | None = None  # first window, how many, what was captured
        self._kept: dict[int, Captured] = {}  # rounds that steps will ask for again, by first window

    def restore(self, step: int, position: dict[str, Any]) -> None:
        """Continue at a step from the position that `position` gave for it."""
        self._windows.restore(position)
        self._first, self._drawn = step // self._cfg.steps_per_window, []
        self.forget()

    def tokens(self, first: int, count: int) -> Rows:
        """Return windows `first` to `first + count - 1`; those before the earliest one kept are gone."""
        while len(self._drawn) < first + count - self._first:
            self._drawn.append((self._windows.state(), self._windows.next()))
        return np.stack([tokens for _, tokens in self._drawn[first - self._first :][:count]])

    def positions(self, first: int, count: int) -> Places:
        """Return where the tokens of windows `first` to `first + count - 1` stand, for each length."""
        cfg, numbers = self._cfg, range(first, first + count)
        return np.stack(
            [[draw_positions(cfg.window, length, cfg.seed, number) for number in numbers] for length in cfg.lengths]
        )

    def position(self, step: int) -> dict[str, Any]:
        """Return where in the text the window of a step begins: the step about to be taken."""
        ahead = step // self._cfg.steps_per_window - self._first
        return self._drawn[ahead][0] if ahead < len(self._drawn) else self._windows.state()

    def first_windows(self, count: int, rows: int) -> Iterator[Captured]:
        """Yield windows from the current position on, leaves `[rows, ...]`: for what is fitted to them at first."""
        at_once = self._cfg.windows_at_once
        for first in range(self._first, self._first + count, at_once):
            captured = self._capture_from(first)
            if first < self._cfg.windows_kept:
                self._kept[first] = captured
            for place in range(min(at_once, self._first + count - first)):
                yield jax.tree.map(lambda leaf: leaf[:rows, place], captured)  # noqa: B023

    def at(self, step: int) -> Captured:
        """Return what a step trains on: leaves `[ranges * layers, ...]`. Steps are asked for in order."""
        window, draw = divmod(step, self._cfg.steps_per_window)
        first, captured = self._captured(window)
        return take_step(captured, jnp.int32(window - first), jnp.int32(draw), self._cfg.queries)

    def forget(self) -> None:
        """Drop what was captured, so that the next step captures anew."""
        self._round, self._kept = None, {}

    def _captured(self, window: int) -> tuple[int, Captured]:
        if self._round is None or not self._round[0] <= window < self._round[0] + self._round[1]:
            self._drawn = self._drawn[window - self._first :]
            self._first = window
            self._round = None  # free its memory before the next one is made
            count = self._cfg.windows_at_once
            kept = self._kept.pop(window, None)
            self._round = (window, count, self._capture_from(window) if kept is None else kept)
        return self._round[0], self._round[2]

    def _capture_from(self, window: int) -> Captured:
        """Return as many windows as are captured together, from this one on."""
        cfg, count = self._cfg, self._cfg.windows_at_once

        def draw(number: Array) -> Array:
            return draw_picks(jax.random.fold_in(self._key, number), cfg.window, cfg.queries, cfg.steps_per_window)

        picks = jax.vmap(draw)(jnp.arange(window, window + count))
        return self._capture(window, self.tokens(window, count), self.positions(window, count), picks)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a run, read before it begins: the frozen model and the text."""

    plan: Plan
    params: Params  # device arrays, or NumPy arrays that a compiled layer takes along as it is called
    feed: Feed
    held_out: Rows
    held_out_long: Int32[np.ndarray, "contexts length"]


def open_inputs(plan: Plan, display: Display, beside: Inputs | None = None) -> Inputs:
    """Load the model and the text.

    Args:
        beside: of another run of the same model, whose weights this one shares, and its windows and forward passes
            where text and seed are the same.
    """
    params = _load_params(plan) if beside is None else beside.params
    if beside is not None and _text_of(beside.plan) == _text_of(plan):
        return dataclasses.replace(beside, plan=plan)
    cfg = plan.cfg
    is_tokenized = all(text_files.holds_token_ids(source) for source in (*cfg.data.train, *cfg.data.held_out))
    tokenizer = None if is_tokenized else open_tokenizer(cfg.model)
    windows = open_windows(cfg.data, tokenizer, plan.model.vocab, display.update, plan.length)
    feed_cfg = FeedConfig(
        cfg.data.window,
        plan.lengths,
        cfg.data.seed,
        cfg.ranking.queries,
        cfg.steps_per_window,
        plan.windows_at_once,
        plan.windows_kept,
    )
    if plan.disk is None:
        feed = Feed(windows, functools.partial(_capture_streaming, plan, params), plan.keys[1], feed_cfg)
    else:
        assert cfg.cache_dir is not None
        identity = identify(params, plan.model, cfg.data, plan.lengths, plan.dtype)
        cache = HiddenCache(pathlib.Path(cfg.cache_dir), plan.disk, identity)
        progress = functools.partial(display.update, "hidden states to disk")

        def from_disk(first: int, tokens: Rows, positions: Places, picks: Array) -> Captured:
            draws = feed.tokens, feed.positions
            return capture_cached(cache, params, *draws, first, picks, plan.model, plan.mesh, progress)

        feed = Feed(windows, from_disk, plan.keys[1], feed_cfg)
    return Inputs(plan, params, feed, windows.held_out, windows.held_out_long)


def _text_of(plan: Plan) -> tuple[Any, ...]:
    """Return what windows and forward passes of a run depend on."""
    return plan.cfg.data, plan.cfg.seed, plan.lengths


def _load_params(plan: Plan) -> Params:
    """Load the frozen model to where `--weights` says."""
    where, source = plan.cfg.weights, plan.cfg.model
    if where == "disk":
        return open_weights(source, plan.dtype)[1]
    if where == "host":
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.tree.map(np.asarray, load_weights(source, plan.dtype)[1])
    placement = weights_on(plan.split) or functools.partial(_place_weights, plan)
    return load_weights(source, plan.dtype, placement)[1]


def _place_weights(plan: Plan, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Return where a weight lies: whole on every device, or (`sharded`) its longest axis that the mesh divides spread
    over them; a layer's program then gathers it."""
    sizes = [size if size % plan.mesh.size == 0 else 0 for size in shape]
    longest = sizes.index(max(sizes))
    is_split = plan.cfg.weights == "sharded" and sizes[longest] > 0
    return NamedSharding(plan.mesh, P(*[None] * longest, AXIS) if is_split else P())


def _capture_streaming(
    plan: Plan, params: Params, first: int, tokens: Rows, positions: Places, picks: Array
) -> Captured:
    return capture(params, jnp.asarray(tokens), jnp.asarray(positions), picks, plan.model, plan.forward_mesh)
