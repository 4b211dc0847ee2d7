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
    code_bits: int
    sums: int = 2
    max_len: int = 1024
    dtype: str = "bfloat16"


CASES = (
    HashAppendCase("smollm2-135m", 1, 9, 3, 64, 128, dtype="float32"),
    HashAppendCase("smollm2-135m, 64 bits, one sum", 2, 9, 3, 64, 64, 1),
    HashAppendCase("qwen2.5-7b", 1, 28, 4, 128, 128),
    HashAppendCase("qwen2.5-7b, 24 sequences", 24, 28, 4, 128, 128),
    HashAppendCase("llama3-8b, 256 bits, 40 sequences", 40, 32, 8, 128, 256),
    HashAppendCase("llama2-7b (no groups), 96 bits", 3, 32, 32, 128, 96, 1),
)
