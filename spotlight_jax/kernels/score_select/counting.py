"""How often every rank occurs, counted in a program's shared memory, the highest rank first; and the bin of a cut.

Triton has no sums into shared memory, so single instructions do it. What each one gives is the next one's operand:
that keeps their order. Every number below `step` is in one thread's registers, TOKENS of them in each thread, whichever
Triton's layout puts there:

    number n   its thread clears bins n, n + step, n + 2 step, ..., and reads bin first + n
    rank r     whichever thread has it counts it, 4 (bins - 1 - r) bytes from the first bin: the highest rank first

PTX ISA, chapter 9.7: `st` and `ld` (.shared), `red` (a sum that gives nothing back, in any order: counts are whole
numbers), `bar.sync 0` (all threads of the program: before it bins are cleared, or counted), `mad`.

On the interpreter (`plan.interpret`) all three are plain JAX, so that no test on a CPU runs a line of this PTX: it is
lowered there, and run where there is a GPU, by `trust.is_trusted` and by the tests that are marked `gpu`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from spotlight_jax.kernels.score_select.config import TOKENS
from spotlight_jax.kernels.score_select.plan import Plan, number_operands, run_instruction

WORD = 4  # bytes of a count


def _start_program(bins: int, step: int) -> str:
    """Return PTX that clears the bins; operands: where the lowest rank is counted, 4 x a number of each token."""
    lowest, number = number_operands(2, TOKENS)
    lines = [f".shared .align 4 .b32 bins[{bins}];", ".reg .u32 start, at;", "mov.u32 start, bins;"]
    for token in range(TOKENS):
        lines.append(f"add.u32 at, start, {number[token]};")
        lines += [f"st.shared.u32 [at + {WORD * first}], 0;" for first in range(0, bins, step)]
    lines += [f"add.u32 {lowest[token]}, start, {WORD * (bins - 1)};" for token in range(TOKENS)]
    return "{ " + " ".join([*lines, "bar.sync 0;"]) + " }"


def _add_program() -> str:
    """Return PTX that counts a rank; operands: where the lowest rank is counted, as a result and as given; the rank."""
    [same], [lowest], [rank] = number_operands(3)
    add = f"mad.lo.s32 at, {rank}, -{WORD}, {lowest}; red.shared.add.u32 [at], 1;"
    return f"{{ .reg .u32 at; {add} mov.b32 {same}, {lowest}; }}"


def _read_program(first: int, bins: int) -> str:
    """Return PTX for each token's count; operands: it, where the lowest rank is counted, 4 x a number of each token."""
    count, lowest, number = number_operands(3, TOKENS)
    lines = ["bar.sync 0;", ".reg .u32 at;"]
    for token in range(TOKENS):
        lines.append(f"add.u32 at, {lowest[token]}, {number[token]};")
        lines.append(f"ld.shared.u32 {count[token]}, [at + {WORD * (first + 1 - bins)}];")
    return "{ " + " ".join(lines) + " }"


def start_counting(step: int, plan: Plan) -> Int32[Array, "counted"]:
    """Begin with nothing counted."""
    if plan.interpret:
        return jnp.zeros((plan.bins,), jnp.int32)
    return run_instruction(_start_program(plan.bins, step), WORD * jnp.arange(step, dtype=jnp.int32), pack=TOKENS)


def count_ranks(ranks: Int32[Array, "step"], counted: Int32[Array, "counted"], plan: Plan) -> Int32[Array, "counted"]:
    """Count a step's ranks as well."""
    if plan.interpret:
        return counted.at[plan.bins - 1 - ranks].add(1)
    return run_instruction(_add_program(), counted, ranks)


def read_counts(counted: Int32[Array, "counted"], plan: Plan) -> list[Int32[Array, "counted"]]:
    """Return the histogram, the highest rank first, in as many arrays as it fills."""
    if plan.interpret:
        return [counted]
    numbers = WORD * jnp.arange(counted.size, dtype=jnp.int32)
    firsts = range(0, plan.bins, counted.size)
    return [run_instruction(_read_program(first, plan.bins), counted, numbers, pack=TOKENS) for first in firsts]


def find_bin(bins: Int32[Array, "bins"], wanted: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Return which bin holds the last of `wanted` tokens, and how many tokens lie in those before it."""
    reached, count = jnp.cumsum(bins), bins.size
    places = jnp.arange(count, dtype=jnp.int32)
    # of the last bin before: neither falls
    most = jnp.max(jnp.where(reached < wanted, reached * count + places + 1, 0))
    return most & (count - 1), lax.shift_right_logical(most, count.bit_length() - 1)
