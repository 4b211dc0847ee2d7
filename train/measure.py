"""Selection quality of hash functions on held-out windows, layer by layer."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from spotlight_jax import hashing, metrics, scoring
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.selection import DENSE_LAYERS, SelectionConfig, select_mask
from train.capture import Captured

Oracle = Literal["scores", "probabilities"]
ORACLES: dict[Oracle, str] = {"scores": "oracle-scores", "probabilities": "oracle-mass"}  # as evaluations call them


@functools.partial(jax.jit, static_argnames=("hash_cfg", "selection_cfg", "layers_at_once", "oracle"))
def measure_layers(
    params: hashing.HashParams,
    captured: Captured,
    hash_cfg: hashing.HashConfig,
    selection_cfg: SelectionConfig,
    layers_at_once: int = 1,
    oracle: Oracle = "probabilities",
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
        mass = metrics.attention_probabilities(queries, keys, picks, scores.shape[2])
        true = scoring.exact_scores(queries, keys, per_kv_head) if oracle == "scores" else mass
        return metrics.selection_quality(chosen, select_mask(true, picks, selection_cfg), mass)

    return jax.lax.map(measure_layer, (params, captured), batch_size=layers_at_once)


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """What is measured on held-out windows, and when."""

    every: int = 100
    """Steps between two measurements; the first and the last state are always measured."""
    queries: int = 256
    """Queries per held-out window, spread over it."""
    keep: float = 0.02
    """Share of the visible tokens a query reads."""
    per: Literal["kv_head", "query_head"] = "kv_head"
    """One selection for all query heads that share a KV head, or one per query head."""
    oracle: Oracle = "probabilities"
    """What the oracle of a KV head ranks tokens by: its query heads' summed attention probabilities, the most that one
    set can hold (`oracle-mass` in results), or their summed dot products (`oracle-scores`)."""
    dense_layers: tuple[int, ...] = DENSE_LAYERS
    """Layers that decoding reads densely: trained, but not in the means."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_numbers(self)
        if self.every < 1 or self.queries < 1:
            raise InputError(f"measure every {self.every} steps with {self.queries} queries; give at least 1 of each")
        _ = self.selection  # refuses what selects nothing

    @property
    def selection(self) -> SelectionConfig:
        """The rule of selection, bare: no sinks, no window of recent tokens."""
        return SelectionConfig(keep=self.keep, per=self.per, dense_layers=self.dense_layers)


def orthogonal_lsh(
    key: PRNGKeyArray, code_bits: int, shape: hashing.HeadShape
) -> tuple[hashing.HashParams, hashing.HashConfig]:
    """Random rotations and signs, of as many bits as a selector: what it is compared with."""
    cfg = hashing.HashConfig(form="symmetric", skip="rotation", code_bits=code_bits, hidden=1, centre=False)
    return hashing.init_params(key, cfg, shape), cfg


def measure(
    params: hashing.HashParams,
    held_out: list[Captured],
    hash_cfg: hashing.HashConfig,
    cfg: MeasureConfig,
    layers_at_once: int,
) -> metrics.SelectionQuality:
    """Mean quality over held-out windows: host arrays `[layers, heads]`."""
    rows = [measure_layers(params, seen, hash_cfg, cfg.selection, layers_at_once, cfg.oracle) for seen in held_out]
    return jax.tree.map(lambda *leaves: np.mean([np.asarray(leaf) for leaf in leaves], axis=0), *rows)


def mean_over_sparse(values: Float[np.ndarray, "layers heads"], dense_layers: tuple[int, ...]) -> float:
    """Mean over heads and over the layers that select."""
    sparse = [layer for layer in range(values.shape[0]) if layer not in dense_layers]
    return float(values[sparse].mean())
