"""Pallas' Triton backend, imported when a kernel first takes something of it.

It is deprecated. Without it no kernel runs: `trust.is_trusted` says so, and every op takes plain XLA.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """What the backend calls by that name."""
    if name.startswith("__"):  # Python asks a module for names that it need not have
        raise AttributeError(name)
    from jax.experimental.pallas import triton

    return getattr(triton, name)
