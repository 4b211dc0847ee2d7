"""How much the steps of a request may read: its own `keep`, `budget` or `dense`, within what the server's flags say."""

import dataclasses
from collections.abc import Callable

import numpy as np

from spotlight_jax.config.selection import MIN_TOKENS, SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.selection import apply_rule, budget_rule
from spotlight_jax.serve.errors import ApiError
from spotlight_jax.serve.schema import Body


def selection_of(body: Body, server: SelectionConfig) -> SelectionConfig | None:
    """Return what a server with this budget would be started with; None where a request asks for nothing of its own.

    Raises: ApiError for a number that means nothing.
    """
    try:
        if body.dense:
            return dataclasses.replace(server, keep=1.0, budget=None)
        if body.keep is not None:
            return dataclasses.replace(server, keep=body.keep, budget=None)
        if body.budget is not None:
            return dataclasses.replace(server, keep=None, budget=body.budget, min_tokens=MIN_TOKENS)
    except InputError as error:
        name = "budget" if body.keep is None else "keep"
        raise ApiError(400, str(error), "invalid_value", name) from None
    return None


def check_budget(
    own: SelectionConfig, server: SelectionConfig, tokens: int, end: int, sparse_from: Callable[[SelectionConfig], int]
) -> None:
    """Raise ApiError with the numbers where a step would read more than the server's flags allow at its length.

    A compiled step has room for what the server's own selection reads, and no more.

    Args:
        own: of the request.
        server: of the server.
        tokens: of the prompt.
        end: of prompt and answer.
        sparse_from: length from which a sequence with a selection is read sparsely; below, everything is read.
    """
    lengths = np.arange(max(sparse_from(own), tokens + 1), end + 1, dtype=np.int32)
    read, most = (apply_rule(lengths, *budget_rule(cfg)) for cfg in (own, server))
    over = np.flatnonzero(read > most)
    if over.size == 0:
        return
    first = over[0]
    name = "keep" if own.budget is None else "budget"
    flag = f"--keep {server.share:g}" if server.budget is None else f"--budget {server.budget}"
    raise ApiError(
        400,
        f"{name} {getattr(own, name):g} reads {read[first]} of {lengths[first]} tokens, and this server at most "
        f"{most[first]} ({flag}); lower it, or give dense=true",
        "invalid_value",
        name,
    )
