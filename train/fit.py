"""Hash functions before the first step: fitted to the first training windows."""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from spotlight_jax import fitting, hashing
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.config.selection import SelectionConfig
from train.capture import Captured
from train.config import LayerwiseConfig

_SPLIT_QUERIES = 64  # of a window, that ways of splitting groups are compared on


def needs_windows(cfg: HashConfig) -> bool:
    """Whether anything is measured: hash functions of keys as they are need nothing."""
    return cfg.form == "transform" or cfg.centre


def fit(
    hashes: hashing.HashParams, windows: Iterable[Captured], cfg: LayerwiseConfig, progress: Callable[[int, int], None]
) -> hashing.HashParams:
    """Params of step 0 from what was captured of some windows, leaves `[layers, ...]`."""
    moments, kept = [], []
    for number, seen in enumerate(windows, start=1):
        moments.append(_measure(seen, cfg.layers_at_once))
        if cfg.hash.form == "transform":
            kept.append(_thin(seen))
        progress(number, cfg.fit_windows)
    together = fitting.merge(moments)
    hashes = fitting.fit_params(hashes, together, cfg.hash)
    reading = SelectionConfig(keep=cfg.ranking.top_share, min_tokens=cfg.ranking.min_top)
    return fitting.split_groups(hashes, together, kept, reading, cfg.layers_at_once)


@functools.partial(jax.jit, static_argnames="layers_at_once")
def _measure(seen: Captured, layers_at_once: int) -> fitting.Moments:
    """Moments of all layers on one window."""
    args = seen.keys, seen.queries
    return jax.lax.map(lambda layer: fitting.measure_moments(*layer), args, batch_size=layers_at_once)


def _thin(seen: Captured) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, a few queries and their positions, on the host."""
    count = seen.picks.shape[1]
    few = np.linspace(0, count - 1, min(count, _SPLIT_QUERIES)).astype(int)
    return jax.device_get((seen.keys, seen.queries[:, few], seen.picks[:, few]))
