"""Shapes that real models give `sparse_attention` and `estimated_attention`: what tests check and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from spotlight_jax.moments import empty_moments, fold
from spotlight_jax.tail import init_tail


@dataclasses.dataclass(frozen=True)
class SparseAttentionCase:
    """One call's shapes; heads is kv_heads for one selection per KV head, q_heads for one per query head."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    heads: int
    kv_len: int
    budget: int
    dtype: str = "bfloat16"

    def draw(self, seed: int = 0) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """Draw random arrays; no argument of the call is static."""
        keys, shape = jax.random.split(jax.random.key(seed), 5), (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        queries = jax.random.normal(keys[0], (self.batch, self.q_heads, self.head_dim), self.dtype)
        cache = [jax.random.normal(key, shape, self.dtype) for key in keys[1:3]]
        order = jax.random.uniform(keys[3], (self.batch, self.heads, self.kv_len))
        indices = jnp.argsort(order, axis=-1)[..., : self.budget].astype(jnp.int32)
        is_real = jax.random.bernoulli(keys[4], 0.7, indices.shape).at[..., 0].set(True)
        return (queries, *cache, jnp.where(is_real, indices, 0), is_real), {}


@dataclasses.dataclass(frozen=True)
class EstimatedAttentionCase(SparseAttentionCase):
    """A call with the moments of what is cached: sequences of several lengths, up to the whole cache."""

    def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw random arrays and corrections; no argument of the call is static."""
        (queries, keys, values, indices, is_real), static = super().draw(seed)
        lengths = self.kv_len - 37 * jnp.arange(self.batch, dtype=jnp.int32)
        empty = empty_moments(self.batch, self.kv_heads, self.head_dim, keys.dtype)
        moments = fold(empty, keys, values, 0 * lengths, lengths - 1, self.kv_len)
        drawn = iter(jax.random.split(jax.random.key(seed + 1), 5))
        params = jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(next(drawn), leaf.shape), init_tail(1, self.q_heads)
        )
        is_real = is_real & (indices < lengths[:, None, None])
        return (queries, keys, values, indices, is_real, lengths, moments, params), static


CASES = (
    SparseAttentionCase("smollm2-135m per KV head, 8K", 1, 9, 3, 64, 3, 8192, 164, "float32"),
    SparseAttentionCase("smollm2-135m per query head, 8K", 1, 9, 3, 64, 9, 8192, 164, "float32"),
    SparseAttentionCase("qwen2.5-7b, ragged 4 x 32K", 4, 28, 4, 128, 4, 32768, 656),
    SparseAttentionCase("qwen2.5-7b, 128K", 1, 28, 4, 128, 4, 131072, 2622),
    SparseAttentionCase("llama3-8b per query head, 32K", 1, 32, 8, 128, 32, 32768, 656),
    SparseAttentionCase("llama2-7b (no groups), 4K", 2, 32, 32, 128, 32, 4096, 82),
)
ESTIMATED_CASES = tuple(EstimatedAttentionCase(**dataclasses.asdict(case)) for case in CASES)
