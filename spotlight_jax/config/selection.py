"""How many cached tokens a query reads."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from spotlight_jax.errors import InputError, check_numbers

KEEP, MIN_TOKENS, DENSE_LAYERS = 0.02, 20, (0, 1)  # without flags


SHARE_STEPS = 1_000_000  # `keep` counts in millionths, so that its budget is the same integer everywhere


LONGEST = 2_000_000  # tokens; above it the budget's integers would pass 32 bits


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Budget of a decoding step: how many cached tokens a query reads, and which it always reads."""

    keep: float | None = None
    """Share of a sequence's tokens each query reads: n - int((1 - keep) * n), the paper's rule; in (0, 1]. Without it
    and without a budget, 0.02."""
    budget: int | None = None
    """A fixed number of tokens instead of a share."""
    min_tokens: int = MIN_TOKENS
    """The least a share gives."""
    sink_tokens: int = 0
    """First tokens of a sequence that are always read; counted in the budget."""
    recent_tokens: int = 0
    """Newest tokens that are always read, the query's own included; counted in the budget."""
    per: Literal["kv_head", "query_head"] = "kv_head"
    """One selection for all query heads that share a KV head, or one per query head."""
    dense_layers: tuple[int, ...] = DENSE_LAYERS
    """Layers that read everything."""
    min_context: int | Literal["auto"] = "auto"
    """Sequences shorter than this are read densely; `auto`: from where a sparse step was measured to be faster."""

    def __post_init__(self) -> None:
        """Refuse what selects nothing or more than there is."""
        check_numbers(self)
        if not 1 / SHARE_STEPS <= self.share <= 1:
            raise InputError(f"keep is {self.keep}; give a share above 0 (at least {1 / SHARE_STEPS}) and at most 1")
        if self.budget is not None and not 1 <= self.budget <= LONGEST:
            raise InputError(f"budget is {self.budget}; give at least 1 token and at most {LONGEST}")
        if self.budget is not None and (self.keep is not None or self.min_tokens != MIN_TOKENS):
            given = f"keep {self.keep:g}" if self.keep is not None else f"min_tokens {self.min_tokens}"
            raise InputError(f"{given} is about a share and budget {self.budget} is a fixed number; give one of them")
        for name in ("min_tokens", "sink_tokens", "recent_tokens"):
            if not 0 <= getattr(self, name) <= LONGEST:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more, and at most {LONGEST}")
        if self.budget is not None and self.budget < self.always_read:
            raise InputError(
                f"budget {self.budget} cannot hold {self.sink_tokens} sink and {self.recent_tokens} recent tokens"
            )
        if self.min_context != "auto" and self.min_context < 0:
            raise InputError(f"min_context is {self.min_context}; give 'auto' or 0 or more")
        if any(layer < 0 for layer in self.dense_layers):
            raise InputError(f"dense_layers are {self.dense_layers}; count layers from 0")

    @property
    def share(self) -> float:
        """`keep`, or what stands for it; not looked at where there is a budget."""
        return KEEP if self.keep is None else self.keep

    @property
    def always_read(self) -> int:
        """Tokens read whatever their score: sinks and recent ones, and the query's own."""
        return self.sink_tokens + max(self.recent_tokens, 1)


def check_layers(dense_layers: Sequence[int], layers: int) -> None:
    """Raise InputError where a layer to be read densely is none of the model's; the default suits every model."""
    past = [layer for layer in dense_layers if layer >= layers]
    if past and tuple(dense_layers) != DENSE_LAYERS:
        raise InputError(
            f"dense_layers has {', '.join(map(str, past))}, and the model's {layers} layers count from 0 to "
            f"{layers - 1}; leave out what is past them"
        )
