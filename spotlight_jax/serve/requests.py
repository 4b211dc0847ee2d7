"""What the scheduler is asked for, and the events that it sends while it works."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from spotlight_jax.config.generation import RowConfig
from spotlight_jax.config.selection import SelectionConfig
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
    selection: SelectionConfig | None = None  # how much its steps read; None: what the server's flags say
    logprobs: int | None = None  # of so many most probable tokens at each place; None: of none, and not of the chosen
    deadline: float | None = None  # on the scheduler's clock


@dataclasses.dataclass
class Usage:
    """Tokens and steps that a request took."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, copied instead of computed
    new_tokens: int = 0
    steps: int = 0  # decoding steps: the first token needs none
    tokens_read: int = 0  # by a head of a sparse layer, summed over steps
    tokens_cached: int = 0  # that a dense step would have read, summed over steps


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a chosen token, and the most probable tokens in its place with theirs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that were chosen, and the text that is certain now."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()  # one for each token, where they are asked for


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Return all pieces of a text as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
    )


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
    """The server is stopping and takes no requests."""
