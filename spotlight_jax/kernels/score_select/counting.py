"""The cut, five bits at a time: threads count digits in fields of four bits, a program adds them up, a bin is found."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from spotlight_jax.kernels.score_select.packing import BYTE, WORD_BITS
from spotlight_jax.kernels.score_select.plan import DIGIT_BITS, run_instruction

BINS = 1 << DIGIT_BITS
FIELD_BITS = 4
FIELDS = 8  # of a number
BYTES = WORD_BITS // BYTE
TOKENS = 8  # of a thread
MOST_STEPS = 14  # that fields hold; one more would do, too


def no_digits(step: int) -> tuple:
    """Fields of nothing counted: a number of each token of a step for every eight bins."""
    return tuple(jnp.zeros((step,), jnp.int32) for _ in range(BINS // FIELDS))


def add_digits(relative: Int32[Array, "step"], shift: int, fields: tuple, interpret: bool) -> tuple:
    """Count the digit at `shift` of every rank relative to the cut's lower end; what lies outside the bins is not."""
    amounts = lax.shift_right_logical(relative, shift) * FIELD_BITS

    def one_at(amounts):  # 0 where an amount is negative or past a number's end
        if interpret:
            return lax.shift_left(jnp.ones_like(amounts), amounts)
        return run_instruction("shl.b32", jnp.ones_like(amounts), amounts)

    return tuple(field + one_at(amounts - WORD_BITS * place) for place, field in enumerate(fields))


def add_up_digits(fields: tuple) -> Int32[Array, "pairs"]:
    """Counts of the whole program, the highest bin first: two bins, sixteen bits apart, in a number."""
    pairs = jnp.arange(BINS // 2, dtype=jnp.int32)[:, None]
    first = second = jnp.zeros((1, 1), jnp.int32)
    for place, field in enumerate(fields):
        of_thread = field.reshape(-1, TOKENS)  # fields of eight bits hold its sums
        is_own = pairs // BYTES == len(fields) - 1 - place
        odd, even = (jnp.sum((of_thread >> shift) & 0x0F0F0F0F, axis=1)[None, :] for shift in (FIELD_BITS, 0))
        first, second = jnp.where(is_own, odd, first), jnp.where(is_own, even, second)
    shifts = BYTE * (BYTES - 1 - pairs % BYTES)
    first, second = (lax.shift_right_logical(of_bin, shifts) & 255 for of_bin in (first, second))
    return jnp.sum(first | (second << 16), axis=1)


def store_digits(fields: tuple, counts_ref, start: int = 0) -> None:
    """The counts of all bins, the highest first."""
    counts, bins = add_up_digits(fields), start + 2 * jnp.arange(BINS // 2, dtype=jnp.int32)
    plgpu.store(counts_ref.at[bins], counts & 0xFFFF)
    plgpu.store(counts_ref.at[bins + 1], lax.shift_right_logical(counts, 16))


def find_bin(bins: Int32[Array, "bins"], wanted: Int32[Array, ""]) -> tuple:
    """Which bin, the highest first, holds the last of `wanted` ranks, and how many ranks lie in those before it."""
    reached = jnp.cumsum(bins)
    places = jnp.arange(1, BINS + 1, dtype=jnp.int32)
    most = jnp.max(jnp.where(reached < wanted, reached * BINS + places, 0))  # of the last bin before: neither falls
    return most & (BINS - 1), lax.shift_right_logical(most, DIGIT_BITS)
