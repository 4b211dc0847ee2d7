"""Integer weights of a query's bits: how real ones become integers, and what scores they can give.

A query scores a cached token by one sum of weighted bits or by several, and the highest counts:

    score = max over sums r of (sum_b w_rb bit_b - floor(sum_b w_rb / 2))

which is half of sum_b w_rb (+-1): sums with other weights can be compared, and one sum ranks as sum_b w_b bit_b does.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

INT8_LIMIT = 127
TOTAL = 1020  # scores from -510 to 510, with what no score has, fit ten bits: 1,024 bins count them


@dataclasses.dataclass(frozen=True)
class WeightBounds:
    """Bounds of the weights of one sum."""

    limit: int
    """Magnitude of one weight."""
    total: int
    """Magnitudes of all weights together."""

    @property
    def score_range(self) -> tuple[int, int]:
        """Least and greatest score."""
        half = (self.total + 1) // 2
        return -half, half

    @property
    def rank_bits(self) -> int:
        """Bits that hold scores counted from 1 on: 0 is below them, and the greatest number is none of theirs."""
        least, greatest = self.score_range
        return (greatest - least + 2).bit_length()

    @property
    def bits(self) -> int:
        """Two's complement bits that hold every weight; 1 where all are +1 or -1."""
        return 1 if self.limit == 1 else self.limit.bit_length() + 1


def real_bounds(code_bits: int) -> WeightBounds:
    """Return the bounds of weights that are rounded from real ones."""
    return WeightBounds(INT8_LIMIT, max(TOTAL, code_bits))


def real_room(code_bits: int) -> int:
    """Return what magnitudes may add up to before they are rounded, which adds half a unit a bit at most."""
    return TOTAL - code_bits // 2


def quantise(weights: Float[Array, "*batch score_heads code_bits"]) -> Int32[Array, "*batch score_heads code_bits"]:
    """Round real weights to integers within `real_bounds`, on one scale for all sums of a query."""
    sizes = jnp.abs(weights)
    largest = jnp.max(sizes, axis=(-2, -1), keepdims=True)
    total = jnp.max(jnp.sum(sizes, axis=-1, keepdims=True), axis=-2, keepdims=True)
    room = real_room(weights.shape[-1])
    scale = jnp.minimum(INT8_LIMIT / jnp.maximum(largest, 1e-30), room / jnp.maximum(total, 1e-30))
    return jnp.round(weights * scale).astype(jnp.int32)


def halves(weights: Int32[Array, "*batch code_bits"]) -> Int32[Array, "*batch"]:
    """Return what is taken off each sum: half of its weights, rounded down."""
    return jnp.sum(weights, axis=-1) >> 1
