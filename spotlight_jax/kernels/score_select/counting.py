"""How often every rank occurs, counted in a program's shared memory, the highest rank first; and the bin of a cut.

Triton has no sums into shared memory, so single instructions do it. What each one gives is the next one's operand:
that keeps their order.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from spotlight_jax.kernels.score_select.plan import Plan, run_instruction

TOKENS = 8  # of a thread, in each step: all that it has, as every instruction clears bins of its own
WORD = 4  # bytes of a count


def _start_program(bins: int, step: int) -> str:
    """PTX that clears the program's bins; operands: where the lowest rank is counted, 4 x a number of each token."""
    lines = [f".shared .align 4 .b32 bins[{bins}];", ".reg .u32 start, at;", "mov.u32 start, bins;"]
    for token in range(TOKENS):
        lines.append(f"add.u32 at, start, ${TOKENS + token};")
        lines += [f"st.shared.u32 [at + {WORD * first}], 0;" for first in range(0, bins, step)]
    lines += [f"add.u32 ${token}, start, {WORD * (bins - 1)};" for token in range(TOKENS)]
    return "{ " + " ".join([*lines, "bar.sync 0;"]) + " }"


# Counts a rank; operands: where the lowest rank is counted, twice; the rank.
_ADD_PROGRAM = f"{{ .reg .u32 at; mad.lo.s32 at, $2, -{WORD}, $1; red.shared.add.u32 [at], 1; mov.b32 $0, $1; }}"


def _read_program(first: int, bins: int) -> str:
    """PTX for a count of each token; operands: it, where the lowest rank is counted, 4 x a number of each token."""
    lines = ["bar.sync 0;", ".reg .u32 at;"]
    for token in range(TOKENS):
        lines.append(f"add.u32 at, ${TOKENS + token}, ${2 * TOKENS + token};")
        lines.append(f"ld.shared.u32 ${token}, [at + {WORD * (first + 1 - bins)}];")
    return "{ " + " ".join(lines) + " }"


def start_counting(step: int, plan: Plan) -> Int32[Array, "counted"]:
    """Nothing counted yet."""
    if plan.interpret:
        return jnp.zeros((plan.bins,), jnp.int32)
    return run_instruction(_start_program(plan.bins, step), WORD * jnp.arange(step, dtype=jnp.int32), pack=TOKENS)


def count_ranks(ranks: Int32[Array, "step"], counted: Int32[Array, "counted"], plan: Plan) -> Int32[Array, "counted"]:
    """What is counted with a step's ranks."""
    if plan.interpret:
        return counted.at[plan.bins - 1 - ranks].add(1)
    return run_instruction(_ADD_PROGRAM, counted, ranks)


def read_counts(counted: Int32[Array, "counted"], plan: Plan) -> list[Int32[Array, "counted"]]:
    """The histogram, the highest rank first, in as many arrays as it fills."""
    if plan.interpret:
        return [counted]
    numbers = WORD * jnp.arange(counted.size, dtype=jnp.int32)
    firsts = range(0, plan.bins, counted.size)
    return [run_instruction(_read_program(first, plan.bins), counted, numbers, pack=TOKENS) for first in firsts]


def find_bin(bins: Int32[Array, "bins"], wanted: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Which bin holds the last of `wanted` tokens, and how many tokens lie in those before it."""
    reached, count = jnp.cumsum(bins), bins.size
    places = jnp.arange(count, dtype=jnp.int32)
    # of the last bin before: neither falls
    most = jnp.max(jnp.where(reached < wanted, reached * count + places + 1, 0))
    return most & (count - 1), lax.shift_right_logical(most, count.bit_length() - 1)
