"""Shapes that real models give `score_select`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from spotlight_jax.weights import WeightBounds


@dataclasses.dataclass(frozen=True)
class ScoreSelectCase:
    """One call's shapes."""

    name: str
    batch: int
    code_heads: int
    heads: int
    code_bits: int
    kv_len: int
    budget: int
    sums: int = 2
    bounds: WeightBounds = WeightBounds(127, 1020)

    def draw(self, seed: int = 0) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """Draw random arrays, and the call's static arguments."""
        keys, limit = jax.random.split(jax.random.key(seed), 4), self.bounds.limit
        codes = jax.random.bits(keys[0], (self.batch, self.code_heads, self.code_bits // 32, self.kv_len), jnp.uint32)
        shape = self.batch, self.heads, self.sums, self.code_bits
        weights = jax.random.randint(keys[1], shape, -limit, limit + 1, jnp.int32)
        total = jnp.maximum(jnp.sum(jnp.abs(weights), axis=-1, keepdims=True), self.bounds.total)
        weights = jnp.trunc(weights * (self.bounds.total / total)).astype(jnp.int8)
        ends = jax.random.randint(keys[2], (self.batch,), self.budget, self.kv_len + 1, jnp.int32)
        budgets = jax.random.randint(keys[3], (self.batch,), 1, self.budget + 1, jnp.int32)
        return (codes, weights, ends, budgets), {"max_budget": self.budget, "bounds": self.bounds}


SIGNS = WeightBounds(7, 7 * 128)

CASES = (
    ScoreSelectCase("smollm2-135m per KV head, 8K", 1, 3, 3, 128, 8192, 164),
    ScoreSelectCase("smollm2-135m per query head, 64 bits, 8K", 1, 3, 9, 64, 8192, 164, 1),
    ScoreSelectCase("llama3-8b, 256 bits, 2 x 8K", 2, 8, 8, 256, 8192, 164),
    ScoreSelectCase("llama3-70b, sums of signs, 256 bits, 8K", 1, 8, 8, 256, 8192, 164, 1, WeightBounds(8, 8 * 256)),
    ScoreSelectCase("qwen2.5-7b, ragged 4 x 32K", 4, 4, 4, 128, 32768, 656),
    ScoreSelectCase("qwen2.5-7b, 24 x 32K", 24, 4, 4, 128, 32768, 656),
    ScoreSelectCase("qwen2.5-7b, one sum, 24 x 32K", 24, 4, 4, 128, 32768, 656, 1),
    ScoreSelectCase("qwen2.5-7b, 32 x 32K", 32, 4, 4, 128, 32768, 656),
    ScoreSelectCase("qwen2.5-7b, 128K", 1, 4, 4, 128, 131072, 2622),
    ScoreSelectCase("qwen2.5-7b, sums of signs, 128K", 1, 4, 4, 128, 131072, 2622, 1, SIGNS),
    ScoreSelectCase("qwen2.5-7b, 8 x 128K", 8, 4, 4, 128, 131072, 2622),
    ScoreSelectCase("qwen2.5-7b, 512K", 1, 4, 4, 128, 524288, 10486),
)
