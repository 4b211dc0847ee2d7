"""What hash functions are trained for: what is no part of a loss is no flag of it."""

import dataclasses
from typing import Literal

from spotlight_jax.errors import InputError, check_numbers

Target = Literal["query_head", "kv_head"]


@dataclasses.dataclass(frozen=True)
class _Loss:
    """Settings that losses share: which keys are top, and on how many queries they are ranked."""

    target: Literal["query_head", "kv_head", "both"] = "query_head"
    """Rank keys for each query head by its dot products (the paper), or for each KV head, as it selects: summed scores
    by the attention probabilities of its query heads together; both: the mean of the two losses, on the same queries
    and other keys."""
    top_share: float = 0.02
    """Share of a query's visible keys that count as top."""
    min_top: int = 20
    """Least number of top keys, as decoding reads at least so many."""
    top_rule: Literal["prefix", "total"] = "prefix"
    """Take the share of the keys a query sees (prefix), or of the whole window for all queries (total: the paper)."""
    queries: int = 256
    """Random queries per window and step."""
    queries_at_once: int = 64
    """Queries worked on together: lower it to use less memory."""

    def __post_init__(self) -> None:
        """Refuse what no loss can be computed from."""
        check_numbers(self)
        if not 0 < self.top_share < 1:
            raise InputError(f"top_share is {self.top_share}; give a share above 0 and below 1, such as 0.02")
        _check_counts(self, "queries", "queries_at_once", "min_top")
        if self.queries > self.queries_at_once and self.queries % self.queries_at_once:
            raise InputError(f"queries ({self.queries}) must be a multiple of queries_at_once ({self.queries_at_once})")

    @property
    def targets(self) -> tuple[Target, ...]:
        """For which heads keys are ranked: each has a loss of its own."""
        return ("query_head", "kv_head") if self.target == "both" else (self.target,)


@dataclasses.dataclass(frozen=True)
class MassLoss(_Loss):
    """The attention probability that a query reads, by a soft cut."""

    loss: Literal["mass"] = "mass"
    """mass: the attention probability that is read; pairs: top keys above others, by Bradley-Terry (the paper). Each
    has flags of its own."""
    softness: float = 0.012
    """Width of the cut, in root mean square distances of scores from it."""

    def __post_init__(self) -> None:
        """Refuse a cut without width."""
        super().__post_init__()
        _check_above_0(self, "softness")


@dataclasses.dataclass(frozen=True)
class PairLoss(_Loss):
    """Top keys above others, by Bradley-Terry (the paper)."""

    loss: Literal["pairs"] = "pairs"
    """pairs: top keys above others, by Bradley-Terry (the paper); mass: the attention probability that is read. Each
    has flags of its own."""
    tops: int = 48
    """Random ranks of the top set per query, spread over it; at most the largest top set of a window."""
    others: int = 256
    """Random ranks of the remaining keys per query."""
    always_top: int = 8
    """So many of the most probable keys are in every sample of tops (0: the paper)."""
    weighting: Literal["uniform", "attention"] = "attention"
    """Weigh all top keys alike (the paper), or half of the weight by attention probability."""
    beta: float = 1.0
    """Slope of the loss."""
    alpha: float = 3.0
    """Margin by which a top key should win (3 in the paper's text, 0 in its released scripts)."""

    def __post_init__(self) -> None:
        """Refuse samples of nothing."""
        super().__post_init__()
        _check_counts(self, "tops", "others")
        _check_above_0(self, "beta")
        if self.alpha < 0:
            raise InputError(f"alpha is {self.alpha}; give a margin of 0 or more")
        if not 0 <= self.always_top <= self.tops:
            raise InputError(f"always_top is {self.always_top}; give 0 to {self.tops}, the number of tops")


LossConfig = MassLoss | PairLoss
LOSSES: dict[str, type[LossConfig]] = {"mass": MassLoss, "pairs": PairLoss}


def _check_counts(cfg: _Loss, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < 1:
            raise InputError(f"{name} is {getattr(cfg, name)}; give at least 1")


def _check_above_0(cfg: _Loss, name: str) -> None:
    if getattr(cfg, name) <= 0:
        raise InputError(f"{name} is {getattr(cfg, name)}; give a number above 0")
