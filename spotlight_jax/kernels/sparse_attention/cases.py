"""Shapes that real models give `sparse_attention`: what tests check and benchmarks time."""

import dataclasses


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


CASES = (
    SparseAttentionCase("smollm2-135m per KV head, 8K", 1, 9, 3, 64, 3, 8192, 164, "float32"),
    SparseAttentionCase("smollm2-135m per query head, 8K", 1, 9, 3, 64, 9, 8192, 164, "float32"),
    SparseAttentionCase("qwen2.5-7b, ragged 4 x 32K", 4, 28, 4, 128, 4, 32768, 656),
    SparseAttentionCase("qwen2.5-7b, 128K", 1, 28, 4, 128, 4, 131072, 2622),
    SparseAttentionCase("llama3-8b per query head, 32K", 1, 32, 8, 128, 32, 32768, 656),
    SparseAttentionCase("llama2-7b (no groups), 4K", 2, 32, 32, 128, 32, 4096, 82),
)
