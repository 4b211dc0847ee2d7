"""Texts to token windows: tokenised once, held-out windows set apart, training order a function of the seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from spotlight_jax import documents, texts
from spotlight_jax.config.data import DataConfig
from spotlight_jax.documents import Source
from spotlight_jax.encoding import Encoder, NullCount
from spotlight_jax.errors import InputError
from spotlight_jax.text_files import pick_text

_log = logging.getLogger(__name__)
LONG_WINDOWS = 2  # of a whole context's length, set aside where there is text for them
_LONG_SHARE = 8  # a source gives at most this part of its windows to one of them
_FULL_SHARE = 1_000_000  # integer weights, so that whose turn it is is exact, sum to about this


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """Size of one training source, for the plan shown before a run."""

    name: str
    share: float  # of the training windows
    tokens: int | None  # None: a stream, length unknown
    train_windows: int | None


def open_windows(
    cfg: DataConfig,
    tokenizer: Any,
    vocab_size: int | None = None,
    progress: texts.Progress | None = None,
    length: int | None = None,
) -> Windows:
    """Read, tokenise (once; later runs use the cache) and pack the text.

    Args:
        cfg: texts, and how they are cut into windows.
        tokenizer: of `transformers` or `tokenizers`; None if every text is a `.npy` file.
        vocab_size: the model's; ids in `.npy` files must be below it. None: the tokenizer's.
        progress: called with what is being done, how much is done, and how much there is in all.
        length: also set aside windows of this many tokens, more than `cfg.window`.

    Raises: InputError where a text cannot be read, or there are too few tokens.
    """
    encoder = Encoder(tokenizer, vocab_size, progress)
    train = documents.find_sources(cfg.train)
    held_out = documents.find_sources(cfg.held_out)
    for source in (*train, *held_out):
        if source.text is not None:
            texts.read_text(source.text, progress)
    _refuse_repeats(train, held_out)
    pools: list[_Local | _Stream] = [_open_source(source, cfg, encoder) for source in train]
    weights = _integer_weights(train, pools, cfg.weights)
    if held_out:
        test_pools = [_open_source(source, cfg, encoder) for source in held_out]
        test_weights = _integer_weights(held_out, test_pools, ())
        kept = _set_aside(test_pools, test_weights, cfg, spare=0)
        long = _set_aside_long(test_pools, length or cfg.window, cfg.window, share=1)
    else:
        kept = _set_aside(pools, weights, cfg, spare=1)
        long = _set_aside_long(pools, length or cfg.window, cfg.window, share=_LONG_SHARE)
    return Windows(cfg, pools, weights, kept, long)


def read_windows(
    cfg: DataConfig, tokenizer: Any, vocab_size: int | None = None, progress: texts.Progress | None = None
) -> dict[str, Int32[np.ndarray, "windows window"]]:
    """Read up to `held_out_windows` windows of each text in `train`, spread over it, by its name: for an evaluation.

    Args: as `open_windows`.
    """
    encoder = Encoder(tokenizer, vocab_size, progress)
    sources = documents.find_sources(cfg.train)
    found = {}
    for source in sources:
        if source.text is not None:
            texts.read_text(source.text, progress)
    _refuse_repeats(sources, ())
    for source in sources:
        pool = _open_source(source, cfg, encoder)
        count = cfg.held_out_windows if pool.train_windows is None else min(cfg.held_out_windows, pool.train_windows)
        found[source.name] = np.stack(pool.set_aside(count))
    return found


def _open_source(source: Source, cfg: DataConfig, encoder: Encoder) -> _Local | _Stream:
    if source.hub is not None:
        return _Stream(source, cfg, encoder)
    hashes = documents.hash_source(source)
    if source.files:  # a copy of a file could put its held-out windows into training
        unique = dict(zip(reversed(hashes), reversed(source.files), strict=True))
        hashes = tuple(dict.fromkeys(hashes))
        source = dataclasses.replace(source, files=tuple(unique[digest] for digest in hashes))
    identity = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return _Local(source, encoder.load(source, hashes, cfg.text_column), identity, cfg)


def _refuse_repeats(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Raise InputError where a file or data set is given twice: training would see held-out text."""
    seen: dict[Any, str] = {}
    for source in (*train, *held_out):
        keys = [source.hub] if source.hub is not None else set(documents.hash_source(source))
        for key in keys:
            if key in seen:
                raise InputError(f"'{source.name}' and '{seen[key]}' hold the same text; give each text once")
        seen.update(dict.fromkeys(keys, source.name))


def _integer_weights(sources: Sequence[Source], pools: Sequence[_Local | _Stream], given: Sequence[float]) -> list[int]:
    """Return each source's turns in a million: as given, else by windows; a stream of unknown length as the largest."""
    sizes = [0] * (1 + max(source.given for source in sources))
    for source, pool in zip(sources, pools, strict=True):
        sizes[source.given] += pool.train_windows or 0
    largest = max(sizes) or 1
    weights = list(given) or [size or largest for size in sizes]
    total = sum(weights)
    return [max(1, round(_FULL_SHARE * weights[source.given] * source.share / total)) for source in sources]


def _set_aside(
    pools: Sequence[_Local | _Stream], weights: Sequence[int], cfg: DataConfig, spare: int
) -> Int32[np.ndarray, "windows window"]:
    """Return held-out windows from every source by its weight, taking turns, `spare` windows of each left over."""
    left = [cfg.held_out_windows if pool.train_windows is None else pool.train_windows - spare for pool in pools]
    if sum(left) < cfg.held_out_windows:
        raise InputError(
            f"the text gives {sum(left)} windows of {cfg.window} tokens to hold out, not {cfg.held_out_windows}; "
            "give more text, a smaller window, or fewer held_out_windows"
        )
    turns = _Turns(weights)
    order: list[int] = []
    for _ in range(cfg.held_out_windows):
        order.append(turns.take([count > 0 for count in left]))
        left[order[-1]] -= 1
    kept = [iter(pool.set_aside(order.count(index))) for index, pool in enumerate(pools)]
    rows = [next(kept[index]) for index in order]
    return np.stack(rows) if rows else np.zeros((0, cfg.window), np.int32)


def _set_aside_long(
    pools: Sequence[_Local | _Stream], length: int, window: int, share: int
) -> Int32[np.ndarray, "windows length"]:
    """Return up to `LONG_WINDOWS` windows of `length` tokens from the largest local sources; none if too small."""
    cells = -(-length // window)
    able = [pool for pool in pools if isinstance(pool, _Local) and pool.train_windows >= share * cells]
    able.sort(key=lambda pool: -pool.train_windows)
    rows: list[np.ndarray] = []
    if length > window:
        rows = [row for pool in able if (row := pool.set_aside_long(length)) is not None][:LONG_WINDOWS]
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)


class Windows:
    """Held-out windows, and training windows one after another without end."""

    def __init__(
        self,
        cfg: DataConfig,
        pools: Sequence[_Local | _Stream],
        weights: Sequence[int],
        held_out: np.ndarray,
        long: np.ndarray,
    ) -> None:
        self.held_out: Int32[np.ndarray, "windows window"] = held_out
        self.held_out_long: Int32[np.ndarray, "windows length"] = long
        self._pools = pools
        self._turns = _Turns(weights)
        total = sum(weights)
        self.sources = tuple(
            SourceSummary(pool.name, weight / total, pool.tokens, pool.train_windows)
            for pool, weight in zip(pools, weights, strict=True)
        )
        self._copies, self._seed, self._drawn = cfg.copies, cfg.seed, 0
        order: list[Any] = [cfg.window, cfg.seed, cfg.copies]
        order += [list(long.shape)] if len(long) else []
        identity = [[pool.identity for pool in pools], list(weights), held_out.shape[0], *order]
        self._fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def next(self) -> Int32[np.ndarray, " window"]:
        """Return the next training window."""
        window = self._pools[self._turns.take()].take()
        rng = np.random.default_rng((self._seed, self._drawn))
        self._drawn += 1
        return _copy_passage(window, rng) if rng.random() < self._copies else window

    def state(self) -> dict[str, Any]:
        """Return the position, as JSON; `restore` continues from it with the very windows that would have come."""
        return {
            "fingerprint": self._fingerprint,
            "turns": list(self._turns.credits),
            "drawn": self._drawn,
            "sources": [pool.state() for pool in self._pools],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state` gave for the same text, window and seed."""
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                "the saved position belongs to other text, weights, window or seed; resume with those of the first run"
            )
        self._turns.credits = list(state["turns"])
        self._drawn = int(state["drawn"])
        for pool, position in zip(self._pools, state["sources"], strict=True):
            pool.restore(position)


def _copy_passage(window: Int32[np.ndarray, " window"], rng: np.random.Generator) -> Int32[np.ndarray, " window"]:
    """Return the window with a passage of 1/16 to 1/3 of it written a second time, anywhere behind the first."""
    length = int(rng.integers(max(1, len(window) // 16), max(2, len(window) // 3)))
    source = int(rng.integers(0, len(window) - 2 * length + 1))
    target = int(rng.integers(source + length, len(window) - length + 1))
    copied = window.copy()
    copied[target : target + length] = window[source : source + length]
    return copied


class _Turns:
    """Order of turns: each source's share of any run of turns is within one turn of its weight."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = list(weights)
        self.credits = [0] * len(weights)

    def take(self, is_open: Sequence[bool] | None = None) -> int:
        """Return the source that is furthest behind its share; only among those that are open, if given."""
        able = [index for index in range(len(self.weights)) if is_open is None or is_open[index]]
        for index in able:
            self.credits[index] += self.weights[index]
        turn = max(able, key=lambda index: (self.credits[index], -index))
        self.credits[turn] -= sum(self.weights[index] for index in able)
        return turn


class _Local:
    """Windows on a fixed grid over one source's tokens; each epoch visits every training one in a new order."""

    def __init__(self, source: Source, tokens: np.ndarray, identity: str, cfg: DataConfig) -> None:
        if len(tokens) < cfg.window:
            raise InputError(
                f"'{source.name}' holds {len(tokens)} tokens, fewer than one window of {cfg.window}; "
                "give more text or a smaller window"
            )
        self.name = source.name
        self.tokens: int | None = len(tokens)
        self.identity = identity
        self._ids = tokens
        self._window = cfg.window
        self._seed = (cfg.seed, int(identity[:15], 16))
        self._grid = np.arange(len(tokens) // cfg.window)
        self._drawn = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def train_windows(self) -> int:
        return len(self._grid)

    def set_aside(self, count: int) -> list[np.ndarray]:
        """Return windows spread evenly over the source, which training then never sees."""
        chosen = (2 * np.arange(count) + 1) * len(self._grid) // (2 * max(count, 1))
        kept = [self._read(index) for index in self._grid[chosen].tolist()]
        self._grid = np.delete(self._grid, chosen)
        return kept

    def set_aside_long(self, length: int) -> np.ndarray | None:
        """Return one window of `length` tokens near the middle that training never sees; None where none fits."""
        cells = -(-length // self._window)
        run = self._grid[cells - 1 :] - self._grid[: len(self._grid) - cells + 1] == cells - 1  # no cell is missing
        starts = np.flatnonzero(run)
        if not len(starts):
            return None
        start = int(starts[np.argmin(np.abs(starts - (len(self._grid) - cells) // 2))])
        first = int(self._grid[start]) * self._window
        self._grid = np.delete(self._grid, np.s_[start : start + cells])
        return np.asarray(self._ids[first : first + length]).astype(np.int32)

    def take(self) -> np.ndarray:
        epoch, position = divmod(self._drawn, len(self._grid))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._grid))
            self._order = (epoch, order)
        self._drawn += 1
        return self._read(int(self._grid[self._order[1][position]]))

    def _read(self, index: int) -> np.ndarray:
        return np.asarray(self._ids[index * self._window : (index + 1) * self._window]).astype(np.int32)

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn = int(state["drawn"])


class _Stream:
    """Windows packed from a hub data set in its own order; it starts again when it ends."""

    tokens: int | None = None
    train_windows: int | None = None

    def __init__(self, source: Source, cfg: DataConfig, encoder: Encoder) -> None:
        assert source.hub is not None
        self.name = source.name
        self.identity = json.dumps(dataclasses.astuple(source.hub))
        self._data = documents.open_stream(source.hub, cfg.text_column)
        self._cfg = cfg
        self._encoder = encoder
        self._nulls = NullCount(source.name, cfg.text_column)
        self._start = self._data.state_dict()
        self._go_to(self._start)

    def _go_to(self, position: dict[str, Any]) -> None:
        self._data.load_state_dict(position)
        self._rows = iter(self._data)
        self._before = position  # where the document begins that the next token is in
        self._ids = np.zeros(0, np.int32)
        self._offset = 0

    def _next_document(self) -> bool:
        text = None
        while text is None:
            self._before = self._data.state_dict()
            if (row := documents.next_row(self._rows, self.name)) is None:
                return False
            text = pick_text(row, self._cfg.text_column, self.name)
            if text is None:
                self._nulls.count += 1
                if str(self._nulls.count).strip("0") == "1":  # a stream need not end: said at 1, 10, 100, ...
                    _log.warning(self._nulls.note())
        self._ids = np.concatenate([np.zeros(0, np.int32), *self._encoder.encode([text])])
        self._offset = 0
        return True

    def take(self) -> np.ndarray:
        return self._read(may_repeat=True)

    def _read(self, may_repeat: bool) -> np.ndarray:
        pieces: list[np.ndarray] = []
        missing = self._cfg.window
        tokens_since_start = 1  # the first pass may begin at the very end of the data
        while missing:
            piece = self._ids[self._offset : self._offset + missing]
            self._offset += len(piece)
            missing -= len(piece)
            tokens_since_start += len(piece)
            pieces.append(piece)
            if missing and not self._next_document():
                if not (may_repeat and tokens_since_start):
                    raise InputError(f"'{self.name}' is too short to hold out windows and train; hold out fewer")
                self._go_to(self._start)
                tokens_since_start = 0
        return np.concatenate(pieces).astype(np.int32)

    def set_aside(self, count: int) -> list[np.ndarray]:
        """Return the first windows; training begins with the document after them."""
        kept = [self._read(may_repeat=False) for _ in range(count)]
        if count:
            self._start = self._data.state_dict()
            self._go_to(self._start)
        return kept

    def state(self) -> dict[str, Any]:
        return {"before": self._before, "offset": self._offset}

    def restore(self, state: dict[str, Any]) -> None:
        self._go_to(state["before"])
        if state["offset"]:
            self._next_document()
            self._offset = int(state["offset"])
