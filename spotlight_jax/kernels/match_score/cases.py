"""Shapes that real models give `match_score`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class MatchScoreCase:
    """One call's shapes."""

    name: str
    batch: int
    code_heads: int
    heads: int
    code_bits: int
    kv_len: int
    weight_bits: int
    q_len: int = 1
    sums: int = 1

    def draw(self, seed: int = 0) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """Draw random arrays, and the call's static arguments."""
        keys = jax.random.split(jax.random.key(seed), 2)
        codes = jax.random.bits(keys[0], (self.batch, self.code_heads, self.code_bits // 32, self.kv_len), jnp.uint32)
        shape, end = (self.batch, self.q_len, self.heads, self.sums, self.code_bits), 1 << (self.weight_bits - 1)
        weights = jax.random.randint(keys[1], shape, -end, end, jnp.int32)
        return (codes, jnp.where(weights < 0, -1, 1) if end == 1 else weights), {"weight_bits": self.weight_bits}


CASES = (
    MatchScoreCase("smollm2-135m per KV head, 8K", 1, 3, 3, 128, 8192, 8, sums=2),
    MatchScoreCase("smollm2-135m per query head, 8K", 1, 3, 9, 128, 8192, 8),
    MatchScoreCase("smollm2-135m, paper's form, 8K", 1, 9, 9, 64, 8192, 1),
    MatchScoreCase("qwen2.5-7b per KV head, ragged 4 x 32K", 4, 4, 4, 128, 32768, 8, sums=2),
    MatchScoreCase("qwen2.5-7b per KV head, 128K", 1, 4, 4, 128, 131072, 8, sums=2),
    MatchScoreCase("qwen2.5-7b per KV head, group sum of signs, 128K", 1, 4, 4, 128, 131072, 4),
    MatchScoreCase("qwen2.5-7b per KV head, 512K", 1, 4, 4, 128, 524288, 8, sums=2),
    MatchScoreCase("llama3-8b, paper's form, 128K", 1, 32, 32, 128, 131072, 1),
    MatchScoreCase("llama3-8b per KV head, 256 bits, 8K", 2, 8, 8, 256, 8192, 8, sums=2),
    MatchScoreCase("smollm2-135m teacher-forced, 64 queries of 4K", 1, 3, 9, 128, 4096, 8, q_len=64),
)
