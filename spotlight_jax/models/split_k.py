"""Split-K: a few rows times a weight, the weight's rows in pieces that are multiplied side by side and added up.

A decoding step's products read weights and little else, so enough programs must run at once to keep a GPU's memory
busy. XLA splits them by a formula that is wrong for the projections to queries, keys and values, which it merges, and
for very deep weights. What is split here stays as it is: XLA tunes it, merges it and adds the pieces up in the launch
that adds the bias or the residual.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

FEW_ROWS = 64  # up to which what a product takes is what reading its weights takes


def pieces_of(rows: int, depth: int, backend: str) -> int:
    """Return the number of pieces for `rows` times a weight of `depth` rows; 1: XLA's own split, as good elsewhere.

    Measured on an H100 at the shapes of LLaMA and Qwen models from 1B to 8B: docs/performance.md.
    """
    pieces = 1
    if backend == "gpu" and 1 < rows <= FEW_ROWS:
        if 2048 <= depth < 8192:
            pieces = 4
        elif depth >= 16384:
            pieces = 8
    return pieces if depth % pieces == 0 else 1


def split_k_dot(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None) -> Array:
    """Multiply as `flax.linen.Dense` asks: `x`'s last axis with `kernel`'s first, split where that pays.

    The pieces are multiplied and added in float32. Returns: `x`'s dtype.
    """
    depth, width = kernel.shape
    rows = x.size // depth
    pieces = pieces_of(rows, depth, jax.default_backend())
    if pieces == 1:
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision)
    sums = jnp.einsum(
        "rpk,pkn->prn",
        x.reshape(rows, pieces, depth // pieces),
        kernel.reshape(pieces, depth // pieces, width),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(sums, axis=0).astype(x.dtype).reshape(*x.shape[:-1], width)
