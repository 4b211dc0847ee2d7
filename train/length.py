"""Selection quality at the far end of the positions that a selector covers, a layer at a time to bound memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from spotlight_jax.memory import available_bytes
from spotlight_jax.metrics import SelectionQuality
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params
from spotlight_jax.selector.base import HashFunctions
from train.capture import capture_layers, windows_axis
from train.config import EvaluationConfig
from train.evaluate import evaluate_layers
from train.positions import far_positions
from train.processes import any_of, fetch

MOST_QUERIES = 64  # of a window: their probabilities over a long context are large


@dataclasses.dataclass(frozen=True)
class FarWindows:
    """Held-out windows that reach the end of the covered positions; their queries lie in the last quarter."""

    tokens: Int32[np.ndarray, "windows window"]
    positions: Int32[np.ndarray, " window"]
    is_whole: bool  # as long as the context, not short windows whose positions jump to its end

    def picks(self, queries: int) -> Int32[np.ndarray, " picks"]:
        """Return the places of the queries: spread over the last quarter, the last token included."""
        window = self.tokens.shape[1]
        count, quarter = min(queries, MOST_QUERIES, window - window * 3 // 4), window - window * 3 // 4
        return (window - quarter + np.arange(1, count + 1) * quarter // count - 1).astype(np.int32)


def choose_windows(
    whole: Int32[np.ndarray, "contexts length"],
    short: Int32[np.ndarray, "windows window"],
    length: int,
    model: DecoderConfig,
    itemsize: int,
) -> FarWindows:
    """Choose whole contexts if there are text, a GPU and memory for them; else short windows that jump to the far end.

    Args:
        itemsize: bytes of a number of the frozen model.
    """
    free = None if jax.default_backend() == "cpu" else available_bytes()
    layer = length * (4 * model.embed + 3 * model.mlp + 4 * model.q_heads * model.head_dim) * itemsize
    probabilities = 6 * 4 * MOST_QUERIES * model.q_heads * length
    is_short = free is None or layer + probabilities >= 0.8 * free
    if len(whole) and not any_of(is_short):
        return FarWindows(whole, np.arange(length, dtype=np.int32), is_whole=True)
    few = short[: max(1, min(2, len(short)))]
    return FarWindows(few, far_positions(few.shape[1], length), is_whole=False)


def evaluate_far(
    far: FarWindows,
    model_params: Params,
    model_cfg: DecoderConfig,
    hashes: dict[str, HashFunctions],
    cfg: EvaluationConfig,
    mesh: Mesh,
) -> dict[str, SelectionQuality]:
    """Measure the quality of several hash functions (all layers) on the same windows, from one pass over each.

    Returns: means over windows and queries by name, host arrays `[layers, heads]`.
    """
    picks = far.picks(cfg.queries)
    windows, rows = len(far.tokens), mesh.shape[windows_axis(mesh)]
    found: dict[str, list[list[SelectionQuality]]] = {name: [] for name in hashes}
    for first in range(0, windows, rows):
        numbers = np.minimum(np.arange(first, first + rows), windows - 1)  # the last one again fills the mesh
        positions, at = (jnp.asarray(np.tile(row, (rows, 1))) for row in (far.positions, picks))
        own: dict[str, list[list[SelectionQuality]]] = {name: [] for name in hashes}
        seen_layers = capture_layers(model_params, jnp.asarray(far.tokens[numbers]), positions, at, model_cfg, mesh)
        for layer, seen in enumerate(seen_layers):
            for name, params in hashes.items():
                one = jax.tree.map(lambda leaf: leaf[layer : layer + 1], params)  # noqa: B023
                per_window = []
                for place in range(min(rows, windows - first)):
                    window = jax.tree.map(lambda leaf: leaf[place][None], seen)  # noqa: B023
                    quality = evaluate_layers(one, window, cfg.selection, 1, cfg.oracle)
                    per_window.append(fetch(quality))
                own[name].append(per_window)
        for name, layers in own.items():
            for place in range(len(layers[0])):
                found[name].append([layer[place] for layer in layers])
    return {name: _mean(rows) for name, rows in found.items()}


def _mean(windows: list[list[SelectionQuality]]) -> SelectionQuality:
    """Put layers behind each other, and take the mean over windows."""
    stacked = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *layers) for layers in windows]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *stacked)
