"""Pallas' Triton backend, imported when a kernel first takes something of it.

It is deprecated. Without it no kernel runs: `trust.is_trusted` says so, and every op takes plain XLA.
"""

from typing import Any

from jaxtyping import Array

Ref = Any  # memory that a kernel reads and writes; Pallas has no public type of it
Index = Array | int  # where a program works, or how much: known when it runs, or when it is compiled


def __getattr__(name: str) -> Any:
    """Return what the backend calls by that name."""
    if name.startswith("__"):  # Python asks a module for names that it need not have
        raise AttributeError(name)
    from jax.experimental.pallas import triton

    return getattr(triton, name)
