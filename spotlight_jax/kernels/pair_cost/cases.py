"""Shapes that real models give `pair_cost`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class PairCostCase:
    """One call's shapes."""

    name: str
    q_heads: int
    queries: int
    tops: int
    others: int

    def draw(self, seed: int = 0) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """Draw random arrays, and the call's static arguments. Tops lie on a grid and others halfway between, so that
        no pair is nearly tied, and all implementations count alike."""
        keys, rows = jax.random.split(jax.random.key(seed), 4), (self.q_heads, self.queries)
        top = jnp.round(64 * (2 + 3 * jax.random.normal(keys[0], (*rows, self.tops)))) / 64
        other = (jnp.round(64 * 3 * jax.random.normal(keys[1], (*rows, self.others))) + 0.5) / 64
        weights = jax.random.uniform(keys[2], top.shape, maxval=2.0)
        return (top, weights, other, jax.random.bernoulli(keys[3], 0.9, other.shape)), {"alpha": 3.0}


CASES = (
    PairCostCase("smollm2-135m, default", 9, 64, 48, 256),
    PairCostCase("qwen2.5-7b, default", 28, 64, 48, 256),
    PairCostCase("qwen2.5-7b, the paper's sampling", 28, 64, 164, 1024),
)
