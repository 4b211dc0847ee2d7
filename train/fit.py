"""Hash functions before the first step: fitted to the first training windows."""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector.base import HashFunctions, Sample
from spotlight_jax.selector.fitting import Moments, measure_moments, merge
from train.capture import Captured
from train.config import LayerwiseConfig
from train.processes import fetch, localize

_SPLIT_QUERIES = 64  # of a window, that ways of splitting groups are compared on


def fit(
    hashes: HashFunctions, windows: Iterable[Captured], cfg: LayerwiseConfig, progress: Callable[[int, int], None]
) -> HashFunctions:
    """Fit the hash functions of step 0 to what was captured of some windows, leaves `[layers, ...]`."""
    moments, kept = [], []
    for number, seen in enumerate(windows, start=1):
        moments.append(localize(_measure(seen, cfg.layers_at_once)))
        if hashes.fitted_to == "windows":
            kept.append(_thin(seen))
        progress(number, cfg.fit_windows)
    selection = SelectionConfig(keep=cfg.ranking.top_share, min_tokens=cfg.ranking.min_top)
    return hashes.fit(Sample(merge(moments), kept, selection, cfg.layers_at_once))


@functools.partial(jax.jit, static_argnames="layers_at_once")
def _measure(seen: Captured, layers_at_once: int) -> Moments:
    """Measure the moments of all layers on one window."""
    args = seen.keys, seen.queries
    return jax.lax.map(lambda layer: measure_moments(*layer), args, batch_size=layers_at_once)


def _thin(seen: Captured) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys, a few queries and their positions, on the host."""
    count = seen.picks.shape[1]
    few = np.linspace(0, count - 1, min(count, _SPLIT_QUERIES)).astype(int)
    return fetch((seen.keys, seen.queries[:, few], seen.picks[:, few]))
