"""Shapes that real models give `hash_append`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from spotlight_jax.kernels.hash_append.reference import Transform


@dataclasses.dataclass(frozen=True)
class HashAppendCase:
    """One call's shapes."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    code_bits: int
    sums: int = 2
    max_len: int = 1024
    dtype: str = "bfloat16"

    def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw random arrays; no argument of the call is static. Sequences end all over the cache; axes have one to
        four digits, keys lie on both sides of the outermost levels, and some query heads are in one score head
        alone."""
        draws = iter(jax.random.split(jax.random.key(seed), 16))
        group, per_head = self.q_heads // self.kv_heads, (self.kv_heads, self.head_dim, self.code_bits)

        def draw(*shape: int, scale: float = 1.0, dtype: str = "float32") -> Array:
            return scale * jax.random.normal(next(draws), shape, dtype)

        assignment = jax.random.bernoulli(next(draws), 0.5, (self.kv_heads, self.sums, group)).astype(jnp.float32)
        transform = Transform(
            mean=draw(self.kv_heads, self.head_dim),
            axes=draw(*per_head, scale=0.4 * self.head_dim**-0.5),
            levels=2.0 ** jax.random.randint(next(draws), (self.kv_heads, self.code_bits), 1, 5),
            bit_weights=draw(*per_head),
            head_assignment=assignment.at[:, :, 0].set(1.0),  # no sum is empty
            log_head_scale=draw(self.q_heads),
        )
        heads = self.q_heads, self.kv_heads, self.kv_heads
        new = [draw(self.batch, count, self.head_dim, dtype=self.dtype) for count in heads]
        cache = [draw(self.batch, self.max_len, self.kv_heads, self.head_dim, dtype=self.dtype) for _ in range(2)]
        shape = self.batch, self.kv_heads, self.code_bits // 32, self.max_len
        codes = jax.random.bits(next(draws), shape, jnp.uint32)
        lengths = jax.random.randint(next(draws), (self.batch,), 0, self.max_len, jnp.int32)
        return (*new, transform, *cache, codes, lengths), {}


CASES = (
    HashAppendCase("smollm2-135m", 1, 9, 3, 64, 128, dtype="float32"),
    HashAppendCase("smollm2-135m, 64 bits, one sum", 2, 9, 3, 64, 64, 1),
    HashAppendCase("qwen2.5-7b", 1, 28, 4, 128, 128),
    HashAppendCase("qwen2.5-7b, 24 sequences", 24, 28, 4, 128, 128),
    HashAppendCase("llama3-8b, 256 bits, 40 sequences", 40, 32, 8, 128, 256),
    HashAppendCase("llama2-7b (no groups), 96 bits", 3, 32, 32, 128, 96, 1),
)
