"""Selection quality of hash functions on held-out windows, layer by layer."""

import functools

import jax
from jaxtyping import Array, Float

from spotlight_jax import hashing, metrics, scoring
from spotlight_jax.selection import SelectionConfig, select_mask
from train.capture import Captured


@functools.partial(jax.jit, static_argnames=("hash_cfg", "selection_cfg", "layers_at_once"))
def measure_layers(
    params: hashing.HashParams,
    captured: Captured,
    hash_cfg: hashing.HashConfig,
    selection_cfg: SelectionConfig,
    layers_at_once: int = 1,
) -> metrics.SelectionQuality:
    """Quality of one window's selections per layer and selecting head, by the integer scores that decoding uses."""

    def measure_layer(args: tuple[hashing.HashParams, Captured]) -> metrics.SelectionQuality:
        layer, seen = args
        queries, picks, keys = seen.queries[None], seen.picks[None], seen.keys[None]
        per_kv_head = selection_cfg.per == "kv_head"
        codes = hashing.key_codes(layer, keys, hash_cfg)
        scores = scoring.hash_scores(layer, queries, codes, hash_cfg, per_kv_head)
        group = queries.shape[2] // keys.shape[2]
        bounds = scoring.hash_score_range(hash_cfg, group, per_kv_head)
        chosen = select_mask(scores, picks, selection_cfg, bounds)
        oracle = select_mask(scoring.exact_scores(queries, keys, per_kv_head), picks, selection_cfg)
        mass = metrics.attention_probabilities(queries, keys, picks, scores.shape[2])
        return metrics.selection_quality(chosen, oracle, mass)

    return jax.lax.map(measure_layer, (params, captured), batch_size=layers_at_once)


def mean_of(values: Float[Array, "layers heads"], dense_layers: tuple[int, ...]) -> float:
    """Mean over heads and over the layers that select."""
    sparse = [layer for layer in range(values.shape[0]) if layer not in dense_layers]
    return float(values[sparse, :].mean())
