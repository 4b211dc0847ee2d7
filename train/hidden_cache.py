"""The paper's mode of training: the hidden states before every layer are written to disk once and read back.

One file a window, `[layers, window, embed]` in the model's dtype, so that training from them is bit for bit what
streaming gives. A file is there whole or not at all, so filling can be interrupted. Disk is bounded: a run that needs
more windows than fit fills the cache several times.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from spotlight_jax import files
from spotlight_jax.errors import InputError
from spotlight_jax.memory import GIB
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, apply_layer, attend_densely, embed_tokens
from train.capture import AXIS, Captured, capture_layer, stack_layers


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """How much disk a run's hidden states take."""

    window_bytes: int
    windows: int  # the run needs
    windows_at_once: int  # on disk at the same time

    @property
    def disk_bytes(self) -> int:
        """Most disk taken at any time."""
        return self.window_bytes * self.windows_at_once


def plan_cache(cfg: DecoderConfig, dtype: np.dtype, window: int, windows: int, limit_gib: float) -> CachePlan:
    """Disk need of a run; raises InputError where not even one window fits the limit."""
    window_bytes = cfg.layers * window * cfg.embed * dtype.itemsize
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
        self._open(identity)

    def _open(self, identity: dict[str, object]) -> None:
        """Make or reopen the folder, and refuse one of another run or a disk that is too small."""
        text = json.dumps(identity, sort_keys=True)
        manifest = self._folder / "manifest.json"
        if manifest.exists() and manifest.read_text(encoding="utf-8") != text:
            raise InputError(
                f"'{self._folder}' caches hidden states of another model, text or seed; give another folder"
            )
        if not manifest.exists() and self._folder.exists() and any(self._folder.iterdir()):
            raise InputError(f"'{self._folder}' is not empty and no cache of ours; give another --cache-dir")
        try:
            held = sum(file.stat().st_size for file in self._folder.glob("window-*.npy"))
            existing = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(existing).free
            if self._plan.disk_bytes > free + held:
                raise InputError(
                    f"the cache needs {self._plan.disk_bytes / GIB:.1f} GiB and '{self._folder}' has "
                    f"{(free + held) / GIB:.1f}; lower --cache-gib, --steps or --data.window, or train without it"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_text(manifest, text)
            files.remove_partial(self._folder)
        except OSError as error:
            raise InputError(f"cannot write to '{self._folder}': {error.strerror}") from None

    def file(self, window: int) -> pathlib.Path:
        """Where a window's hidden states lie."""
        return self._folder / f"window-{window:07d}.npy"

    def span(self, window: int) -> range:
        """Windows that are on disk together with this one."""
        first = window // self._plan.windows_at_once * self._plan.windows_at_once
        return range(first, min(first + self._plan.windows_at_once, self._plan.windows))

    def drop_outside(self, span: range) -> None:
        """Delete windows of earlier fillings."""
        for file in self._folder.glob("window-*.npy"):
            if int(file.stem.removeprefix("window-")) not in span:
                file.unlink()

    def write(self, window: int, hidden: np.ndarray) -> None:
        """Keep one window's states; the file appears when it is whole."""
        try:
            with files.replace_file(self.file(window)) as out:
                np.save(out, hidden.view(np.uint16) if hidden.dtype.itemsize == 2 else hidden)
        except OSError as error:
            raise InputError(
                f"cannot write '{self.file(window)}': {error.strerror}; free some disk and --resume"
            ) from None

    def read(self, window: int, dtype: np.dtype) -> np.ndarray:
        """One window's states `[layers, window, embed]`."""
        return np.load(self.file(window)).view(dtype)


def identify(source: str, cfg: DecoderConfig, data: object, dtype: np.dtype) -> dict[str, object]:
    """What a cache's contents depend on."""
    digest = hashlib.sha256(repr((cfg, data)).encode()).hexdigest()
    return {"model": source, "dtype": str(dtype), "config": digest}


@functools.partial(jax.jit, static_argnames="cfg")
def _pass_layer(layer_params, x, cfg):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])
    return apply_layer(layer_params, x, positions, attend_densely, cfg)[0]


def hidden_states(params: Params, tokens: Int32[Array, "one window"], cfg: DecoderConfig) -> np.ndarray:
    """Hidden states before each layer of one window: `[layers, window, embed]` on the host."""
    x = embed_tokens(params, tokens, cfg)
    states = [x]
    for layer in range(cfg.layers - 1):
        x = _pass_layer(params[f"layer_{layer}"], x, cfg)
        states.append(x)
    return np.stack([np.asarray(state[0]) for state in states])


def capture_cached(
    cache: HiddenCache,
    params: Params,
    draw: Callable[[int, int], np.ndarray],
    first: int,
    picks: Int32[Array, "windows picks"],
    cfg: DecoderConfig,
    mesh: Mesh,
    progress: Callable[[int, int], None],
) -> Captured:
    """What `capture` gives for windows from `first` on, from hidden states on disk, filled in where they are missing.

    Args:
        draw: tokens of `count` windows from a first one on.
        progress: windows filled so far, and in all.
    """
    dtype = np.dtype(params["embed"]["table"].dtype)
    wanted = range(first, first + picks.shape[0])
    span = cache.span(first)
    needed = dict.fromkeys(number for number in (*span, *wanted) if number >= first)
    missing = [number for number in needed if not cache.file(number).exists()]
    if missing:
        cache.drop_outside(range(first, max(span.stop, wanted.stop)))
    for done, number in enumerate(missing):
        progress(done, len(missing))
        tokens = jnp.asarray(draw(number, 1))
        cache.write(number, hidden_states(params, tokens, cfg))
    hidden = np.stack([cache.read(number, dtype) for number in wanted], axis=1)
    spread = NamedSharding(mesh, P(AXIS))
    picks = jax.device_put(picks, spread)
    captured = []
    for layer in range(cfg.layers):
        x = jax.device_put(hidden[layer], spread)
        captured.append(capture_layer(params[f"layer_{layer}"], x, picks, cfg, mesh, passes_on=False)[1])
    return stack_layers(captured, mesh)
