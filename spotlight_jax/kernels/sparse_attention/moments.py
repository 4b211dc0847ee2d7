"""Sums over the tokens that were read but position 0, as kernels make them: x and y are those of `Reads`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from spotlight_jax.kernels import triton as plgpu


class Moments(NamedTuple):
    """Sums, or where and how they are kept: count and values of a selection, the others of each of its query heads."""

    count: Any
    logits: Any  # sum of x
    squares: Any  # sum of x^2
    values: Any  # sum of y, a vector
    products: Any  # sum of x y, a vector


def make_moments(of_selection: Callable[..., Any], of_head: Callable[..., Any], head_dim: int) -> Moments:
    """Make each from its shape."""
    return Moments(of_selection(), of_head(), of_head(), of_selection(head_dim), of_head(head_dim))


def sum_tile(x: Array, y: Array, is_counted: Array, dtype: jnp.dtype, precision: lax.Precision | None) -> Moments:
    """Return a tile's sums.

    Args:
        x: `[heads, tokens]` in float32, 0 where a token is not counted.
        y: `[tokens, head_dim]` in float32, 0 where a token is not counted.
        is_counted: `[tokens]`.
        dtype: both are rounded to before they are multiplied.
        precision: of the product.
    """
    return Moments(
        count=jnp.sum(jnp.where(is_counted, 1.0, 0.0), axis=0),
        logits=jnp.sum(x, axis=1),
        squares=jnp.sum(x * x, axis=1),
        values=jnp.sum(y, axis=0),
        products=plgpu.dot(x.astype(dtype), y.astype(dtype), precision=precision),
    )
