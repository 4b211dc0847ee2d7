"""The cut, five bits at a time: threads count digits in fields of four bits, a program adds them up, a bin is found."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from spotlight_jax.bits import WORD_BITS
from spotlight_jax.kernels.score_select.plan import DIGIT_BITS, run_instruction

BINS = 1 << DIGIT_BITS
FIELD_BITS = 4
FIELDS = 8  # of a number
BYTE = 8
BYTES = WORD_BITS // BYTE
TOKENS = 8  # of a thread; where it has fewer, sums are as right
MOST_STEPS = 14  # that fields hold


def no_digits(step: int) -> tuple:
    """Fields of nothing counted: a number of each token of a step for every eight bins."""
    return tuple(jnp.zeros((step,), jnp.int32) for _ in range(BINS // FIELDS))


def add_digits(relative: Int32[Array, "step"], shift: int, fields: tuple, interpret: bool) -> tuple:
    """Count the digit at `shift` of every rank relative to the cut's lower end; what lies outside the bins is not."""
    amounts = lax.shift_right_logical(relative, shift) * FIELD_BITS

    def one_at(amounts):  # 0 where an amount is negative or past a number's end
        if interpret:
            return lax.shift_left(jnp.ones_like(amounts), amounts)
        return run_instruction("shl.b32 $0, $1, $2;", jnp.ones_like(amounts), amounts)

    return tuple(field + one_at(amounts - WORD_BITS * place) for place, field in enumerate(fields))


def add_up_digits(fields: tuple) -> tuple:
    """Counts of the whole program, the highest bin first: of every second bin, and of those that follow them."""
    pairs = jnp.arange(BINS // 2, dtype=jnp.int32)[:, None]
    odd = even = jnp.zeros((1, 1), jnp.int32)
    for place, field in enumerate(fields):
        of_thread = field.reshape(-1, TOKENS)  # fields of eight bits hold its sums
        is_own = pairs // BYTES == len(fields) - 1 - place
        sums = (jnp.sum((of_thread >> shift) & 0x0F0F0F0F, axis=1)[None, :] for shift in (FIELD_BITS, 0))
        odd, even = (jnp.where(is_own, own, other) for own, other in zip(sums, (odd, even), strict=True))
    shifts = BYTE * (BYTES - 1 - pairs % BYTES)
    first, second = (lax.shift_right_logical(sums, shifts) & 255 for sums in (odd, even))
    both = jnp.sum(first | (second << 16), axis=1)
    return both & 0xFFFF, lax.shift_right_logical(both, 16)


def find_bin(bins: Int32[Array, "bins"], wanted: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Which bin, the highest first, holds the last of `wanted` ranks, and how many ranks lie before it."""
    reached = jnp.cumsum(bins)
    places = jnp.arange(BINS, dtype=jnp.int32)
    most = jnp.max(jnp.where(reached < wanted, reached * BINS + places + 1, 0))  # of the last bin before: neither falls
    return most & (BINS - 1), lax.shift_right_logical(most, DIGIT_BITS)
