"""Shapes that real models give `pair_cost`: what tests check and benchmarks time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PairCostCase:
    """One call's shapes."""

    name: str
    q_heads: int
    queries: int
    tops: int
    others: int


CASES = (
    PairCostCase("smollm2-135m, default", 9, 64, 48, 256),
    PairCostCase("qwen2.5-7b, default", 28, 64, 48, 256),
    PairCostCase("qwen2.5-7b, the paper's sampling", 28, 64, 164, 1024),
)
