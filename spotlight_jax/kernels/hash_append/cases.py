"""Shapes that real models give `hash_append`: what tests check and benchmarks time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HashAppendCase:
    """One call's shapes."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    code_bits: int
    max_len: int = 1024
    per_kv_head: bool = True
    dtype: str = "bfloat16"


CASES = (
    HashAppendCase("smollm2-135m", 1, 9, 3, 64, 128, 128, dtype="float32"),
    HashAppendCase("smollm2-135m, wide, 64 bits, per query head", 2, 9, 3, 64, 512, 64, per_kv_head=False),
    HashAppendCase("qwen2.5-7b", 1, 28, 4, 128, 128, 128),
    HashAppendCase("qwen2.5-7b, 24 sequences", 24, 28, 4, 128, 128, 128),
    HashAppendCase("qwen2.5-7b, wide, 256 bits, 24 sequences", 24, 28, 4, 128, 512, 256),
    HashAppendCase("llama2-7b (no groups), 96 bits", 3, 32, 32, 128, 128, 96),
)
