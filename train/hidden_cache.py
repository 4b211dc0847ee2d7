"""The paper's mode of training: the hidden states before every layer are written to disk once and read back.

One file a window, `[ranges * layers, window, embed]` in the model's dtype, so that training from them is bit for bit
what streaming gives. A file is there whole or not at all, so filling can be interrupted. Disk is bounded: a run that
needs more windows than fit fills the cache several times.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from spotlight_jax import files, runs
from spotlight_jax.errors import InputError
from spotlight_jax.memory import GIB
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, embed_tokens
from spotlight_jax.models.runner import Dense, run_layers
from train.capture import AXIS, Captured, capture_layer, stack_layers


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Disk that a run's hidden states take."""

    window_bytes: int
    windows: int  # the run needs
    windows_at_once: int  # on disk at the same time

    @property
    def disk_bytes(self) -> int:
        """Most disk taken at any time."""
        return self.window_bytes * self.windows_at_once


def plan_cache(
    cfg: DecoderConfig, dtype: np.dtype, window: int, windows: int, limit_gib: float, ranges: int = 1
) -> CachePlan:
    """Plan the disk that a run needs; raises InputError where not even one window fits the limit.

    Args:
        ranges: ways in which each window is placed.
    """
    window_bytes = ranges * cfg.layers * window * cfg.embed * dtype.itemsize
    at_once = min(windows, int(limit_gib * GIB // window_bytes))
    if at_once < 1:
        raise InputError(
            f"one window's hidden states take {window_bytes / GIB:.2f} GiB, over --cache-gib {limit_gib:g}; raise it"
        )
    return CachePlan(window_bytes=window_bytes, windows=windows, windows_at_once=at_once)


class HiddenCache:
    """Hidden states of consecutive windows in a folder."""

    def __init__(self, folder: pathlib.Path, plan: CachePlan, identity: dict[str, object]) -> None:
        self._folder = folder
        self._plan = plan
        self._sound: set[int] = set()  # windows that were written or compared with their hash by this process
        self._open(identity)

    def _open(self, identity: dict[str, object]) -> None:
        """Make or reopen the folder, and refuse one of another run or a disk that is too small."""
        text = json.dumps(identity, sort_keys=True)
        manifest = self._folder / "manifest.json"
        is_new = not self._folder.exists()
        found = _read_manifest(manifest) if manifest.exists() else None
        if found not in (None, "", text):
            raise InputError(
                f"'{self._folder}' caches hidden states of another model, text or seed; give another folder"
            )
        if found is None and not is_new and any(file.name != runs.LOCK for file in self._folder.iterdir()):
            raise InputError(f"'{self._folder}' is not empty and no cache of ours; give another --cache-dir")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_disk(is_new)
            files.remove_partial(self._folder)
            if found != text:  # new, or cut short: then nothing says what the windows are of
                self.drop_outside(range(0))
                files.write_text(manifest, text)
        except OSError as error:
            raise InputError(f"cannot write to '{self._folder}': {error.strerror}") from None

    def _check_disk(self, is_new: bool) -> None:
        """Raise InputError where the windows do not fit; a folder that was just made is then removed."""
        held = sum(file.stat().st_size for file in self._folder.glob("window-*.npy"))
        free = shutil.disk_usage(self._folder).free
        if self._plan.disk_bytes > free + held:
            if is_new:
                self._folder.rmdir()
            raise InputError(
                f"the cache needs {self._plan.disk_bytes / GIB:.1f} GiB and '{self._folder}' has "
                f"{(free + held) / GIB:.1f}; lower --cache-gib, --steps or --data.window, or train without it"
            )

    def file(self, window: int) -> pathlib.Path:
        """Return where a window's hidden states lie."""
        return self._folder / f"window-{window:07d}.npy"

    def span(self, window: int) -> range:
        """Return the windows that are on disk together with this one."""
        first = window // self._plan.windows_at_once * self._plan.windows_at_once
        return range(first, min(first + self._plan.windows_at_once, self._plan.windows))

    def drop_outside(self, span: range) -> None:
        """Delete windows of earlier fillings."""
        for file in self._folder.glob("window-*.npy"):
            if int(file.stem.removeprefix("window-")) not in span:
                file.unlink()
                self._sound.discard(int(file.stem.removeprefix("window-")))

    def holds(self, window: int, tokens: np.ndarray) -> bool:
        """Whether a window's states are on disk, whole, as they were written, and of these tokens."""
        if window not in self._sound and self.file(window).exists():
            digest, end = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()), b""
            with self.file(window).open("rb") as file:
                while block := file.read(1 << 24):
                    block = end + block
                    end = block[-digest.digest_size :]
                    digest.update(block[: -digest.digest_size])
            if digest.digest() == end:
                self._sound.add(window)
        return window in self._sound

    def write(self, window: int, hidden: np.ndarray, tokens: np.ndarray) -> None:
        """Keep one window's states, and behind them a hash of them and their tokens; the file appears when it is whole.

        Raises: OSError where it cannot be written.
        """
        with files.replace_file(self.file(window)) as out:
            hashed = _Hashed(out, hashlib.sha256(np.asarray(tokens, np.int32).tobytes()))
            np.save(hashed, hidden.view(np.uint16) if hidden.dtype.itemsize == 2 else hidden)
            out.write(hashed.digest.digest())
        self._sound.add(window)

    def read(self, window: int, dtype: np.dtype) -> np.ndarray:
        """Read one window's states `[ranges * layers, window, embed]`."""
        return np.load(self.file(window)).view(dtype)


class _Hashed:
    """A file whose content is hashed as it is written."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self.digest = file, digest

    def write(self, content: bytes) -> int:
        """Write and hash."""
        self.digest.update(content)
        return self._file.write(content)


def _read_manifest(manifest: pathlib.Path) -> str:
    """Return what the manifest holds; nothing where it is no JSON, as one that was cut short."""
    try:
        text = manifest.read_text(encoding="utf-8")
        return text if isinstance(json.loads(text), dict) else ""
    except (ValueError, RecursionError):
        return ""


def identify(
    params: Params, cfg: DecoderConfig, data: object, lengths: tuple[int, ...], dtype: np.dtype
) -> dict[str, object]:
    """Return what a cache's contents depend on, apart from the tokens, which each window's file has a hash of."""
    weights = hashlib.sha256()
    for name in sorted(params):  # a part at a time: they may lie in files
        for path, leaf in jax.tree_util.tree_leaves_with_path({name: params[name]}):
            weights.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            weights.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    digest = hashlib.sha256(repr((cfg, data, lengths)).encode()).hexdigest()
    return {"weights": weights.hexdigest(), "dtype": str(dtype), "config": digest}


def hidden_states(
    params: Params, tokens: Int32[Array, "one window"], positions: Int32[Array, "ranges one window"], cfg: DecoderConfig
) -> np.ndarray:
    """Return the hidden states before each layer of one window, placed one way after another, on the host:
    `[ranges * layers, window, embed]`."""
    states = []
    for own in positions:
        x = embed_tokens(params, tokens, cfg)
        states.append(x)
        before_last = run_layers(params, x, own, lambda layer: Dense(), cfg, layers=range(cfg.layers - 1))
        states += [after for after, _ in before_last]
    return np.stack([np.asarray(state[0]) for state in states])


def capture_cached(
    cache: HiddenCache,
    params: Params,
    draw: Callable[[int, int], np.ndarray],
    place: Callable[[int, int], np.ndarray],
    first: int,
    picks: Int32[Array, "windows picks"],
    cfg: DecoderConfig,
    mesh: Mesh,
    progress: Callable[[int, int], None],
) -> Captured:
    """Return what `capture` gives for windows from `first` on, from hidden states on disk, filled in where missing.

    Args:
        draw: tokens of `count` windows from a first one on.
        place: their positions, `[ranges, count, window]`.
        progress: windows filled so far, and in all.
    """
    dtype = np.dtype(params["embed"]["table"].dtype)
    wanted = range(first, first + picks.shape[0])
    span = cache.span(first)
    needed = dict.fromkeys(number for number in (*span, *wanted) if number >= first)
    for number in wanted:
        if not cache.holds(number, draw(number, 1)):
            cache.file(number).unlink(missing_ok=True)  # damaged, or of other text: made again
    missing = [number for number in needed if not cache.file(number).exists()]
    if missing:
        cache.drop_outside(range(first, max(span.stop, wanted.stop)))
    for done, number in enumerate(missing):
        progress(done, len(missing))
        tokens, positions = jnp.asarray(draw(number, 1)), jnp.asarray(place(number, 1))
        cache.write(number, hidden_states(params, tokens, positions, cfg), np.asarray(tokens))
    hidden = np.stack([cache.read(number, dtype) for number in wanted], axis=1)
    spread = NamedSharding(mesh, P(AXIS))
    *positions, picks = jax.device_put((*jnp.asarray(place(first, picks.shape[0])), picks), spread)
    captured = []
    for row, stream in enumerate(hidden):
        own, layer = divmod(row, cfg.layers)
        x = jax.device_put(stream, spread)
        args = params[f"layer_{layer}"], x, positions[own], picks, cfg, mesh
        captured.append(capture_layer(*args, passes_on=False)[1])
    return stack_layers(captured, mesh)
