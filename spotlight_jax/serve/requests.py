"""What the scheduler is asked for, and what it tells while it works."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from spotlight_jax.config.generation import RowConfig
from spotlight_jax.stops import Stops

Reason = Literal["stop", "length"]
Failure = Literal["timeout", "stopping", "internal"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to be continued."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    row: RowConfig
    stops: Stops
    is_dense: bool = False  # every step reads everything
    deadline: float | None = None  # on the scheduler's clock


@dataclasses.dataclass
class Usage:
    """What a request took."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, copied instead of computed
    new_tokens: int = 0
    steps: int = 0  # decoding steps: the first token needs none
    tokens_read: int = 0  # by a head of a sparse layer, summed over steps
    tokens_cached: int = 0  # that a dense step would have read, summed over steps


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that were chosen, and the text that is certain now."""

    text: str
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a text."""

    reason: Reason
    usage: Usage


@dataclasses.dataclass(frozen=True)
class Failed:
    """The end of a request that got no whole text."""

    failure: Failure
    message: str


Event = Piece | Done | Failed
Send = Callable[[Event], None]  # called in the scheduler's thread; must not wait


class QueueFullError(Exception):
    """So many requests wait that one more would wait too long."""


class StoppingError(Exception):
    """The server takes no more requests."""
