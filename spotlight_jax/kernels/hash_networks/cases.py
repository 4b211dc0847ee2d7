"""Shapes that real models give `hash_networks`: what tests check and benchmarks time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HashNetworksCase:
    """One call's shapes."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    code_bits: int
    dtype: str = "bfloat16"


CASES = (
    HashNetworksCase("smollm2-135m", 1, 9, 3, 64, 128, 128, "float32"),
    HashNetworksCase("smollm2-135m, wide, 64 bits", 2, 9, 3, 64, 512, 64),
    HashNetworksCase("qwen2.5-7b", 1, 28, 4, 128, 128, 128),
    HashNetworksCase("qwen2.5-7b, wide, 24 sequences", 24, 28, 4, 128, 512, 128),
    HashNetworksCase("llama2-7b (no groups), 96 bits", 3, 32, 32, 128, 128, 96),
)
