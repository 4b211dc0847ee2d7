"""Shapes that real models give `select_top`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class SelectTopCase:
    """One call's shapes; rank_bits 15 holds int8 weights on 128 bits, 10 a Hamming sum over a group of 7."""

    name: str
    batch: int
    heads: int
    kv_len: int
    budget: int
    rank_bits: int

    def draw(self, seed: int = 0) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """Draw random arrays, and the call's static arguments."""
        keys = jax.random.split(jax.random.key(seed), 2)
        ranks = jax.random.bits(keys[0], (self.batch, self.heads, self.kv_len), jnp.uint32) >> (32 - self.rank_bits)
        budgets = jax.random.randint(keys[1], ranks.shape[:2], 1, self.budget + 1, jnp.int32)
        return (ranks, budgets), {"max_budget": self.budget, "rank_bits": self.rank_bits}


CASES = (
    SelectTopCase("smollm2-135m per KV head, 8K", 1, 3, 8192, 164, 15),
    SelectTopCase("smollm2-135m per query head, 8K", 1, 9, 8192, 164, 15),
    SelectTopCase("qwen2.5-7b, ragged 4 x 32K", 4, 4, 32768, 656, 15),
    SelectTopCase("qwen2.5-7b, 128K", 1, 4, 131072, 2622, 15),
    SelectTopCase("qwen2.5-7b, Hamming group sum, 128K", 1, 4, 131072, 2622, 10),
    SelectTopCase("qwen2.5-7b, 512K", 1, 4, 524288, 10486, 15),
    SelectTopCase("llama3-8b, exact float scores, 32K", 1, 32, 32768, 656, 32),
)
