"""Selection quality of hash functions on held-out windows, layer by layer."""

import functools

import jax
import numpy as np
from jaxtyping import Float

from spotlight_jax import metrics
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.scoring import exact_scores, hash_score_range, hash_scores
from spotlight_jax.selector.selection import select_mask
from train.capture import Captured
from train.config import EvaluationConfig, Oracle
from train.processes import fetch


@functools.partial(jax.jit, static_argnames=("selection_cfg", "layers_at_once", "oracle"))
def evaluate_layers(
    params: HashFunctions,
    captured: Captured,
    selection_cfg: SelectionConfig,
    layers_at_once: int = 1,
    oracle: Oracle = "probabilities",
) -> metrics.SelectionQuality:
    """Return the quality of one window's selections per layer and selecting head, by the integer scores of decoding."""

    def evaluate_layer(args: tuple[HashFunctions, Captured]) -> metrics.SelectionQuality:
        layer, seen = args
        queries, picks, keys = seen.queries[None], seen.picks[None], seen.keys[None]
        per_kv_head = selection_cfg.per == "kv_head"
        codes = layer.key_codes(keys)
        scores = hash_scores(layer, queries, codes, per_kv_head)
        group = queries.shape[2] // keys.shape[2]
        bounds = hash_score_range(layer, group, per_kv_head)
        chosen = select_mask(scores, picks, selection_cfg, bounds)
        mass = metrics.attention_probabilities(queries, keys, picks, scores.shape[2])
        true = exact_scores(queries, keys, per_kv_head) if oracle == "scores" else mass
        return metrics.selection_quality(chosen, select_mask(true, picks, selection_cfg), mass)

    return jax.lax.map(evaluate_layer, (params, captured), batch_size=layers_at_once)


def evaluate(
    params: HashFunctions,
    held_out: list[Captured],
    cfg: EvaluationConfig,
    layers_at_once: int,
) -> metrics.SelectionQuality:
    """Return the mean quality over held-out windows: host arrays `[layers, heads]`."""
    rows = [evaluate_layers(params, seen, cfg.selection, layers_at_once, cfg.oracle) for seen in held_out]
    return jax.tree.map(lambda *leaves: np.mean(fetch([*leaves]), axis=0), *rows)


def mean_over_sparse(values: Float[np.ndarray, "layers heads"], dense_layers: tuple[int, ...]) -> float:
    """Return the mean over heads and over the layers that select."""
    sparse = [layer for layer in range(values.shape[0]) if layer not in dense_layers]
    return float(values[sparse].mean())
