"""Time of operations in compiled loops, and the bandwidth that bounds them."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, PyTree

LOOP_SECONDS = 0.03  # what one timed loop takes, about
MOST_STEPS = 2000
COPY_BYTES = {"cpu": 256 << 20}
GPU_COPY_BYTES = 1 << 30

# (bit of the output before, inputs, what is held) to (output, what is held afterwards)
Op = Callable[[Int32[Array, ""], Any, Any], tuple[PyTree, Any]]
Held = tuple[Any, ...]  # what an operation runs on, one after another
Loop = Callable[[Held, Any, int], tuple[Held, Held]]


def bit_of(out: PyTree) -> Int32[Array, ""]:
    """Return 0 or 1 from an output's first element: what the next run's input waits for."""
    first = jax.tree.leaves(out)[0].reshape(-1)[0]
    if jnp.issubdtype(first.dtype, jnp.floating):
        first = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32)
    return first.astype(jnp.int32) & 1


def make_loop(op: Op) -> Loop:
    """Make `loop(held, inputs, steps)`: each step runs `op` once on every element of `held`, which is given up.

    The outputs of a step are carried whole, so that none of them can be computed in part; each run waits for the one
    before by `bit_of` its output.

    Returns of the loop: what is held afterwards, and the outputs.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(held: Held, inputs: Any, steps: Array | int) -> tuple[Held, Held]:
        def step(number: Array | int, carry: tuple[Held, Held | None, Array]) -> tuple[Held, Held, Array]:
            ones, _, bit = carry
            kept, outs = [], []
            for one in ones:
                out, one = op(bit, inputs, one)
                bit = bit_of(out)
                kept.append(one)
                outs.append(out)
            return tuple(kept), tuple(outs), bit

        shapes = jax.eval_shape(lambda: step(0, (held, None, jnp.int32(0)))[1])
        outs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.fori_loop(0, steps, step, (held, outs, jnp.int32(0)))[:2]

    return loop


def _clock(loop: Loop, held: Held, inputs: Any, steps: int) -> tuple[float, Held]:
    """Return the seconds of one call, and what is held after it."""
    start = time.perf_counter()
    held, outs = loop(held, inputs, steps)
    jax.block_until_ready(outs)
    return time.perf_counter() - start, held


def count_steps(loop: Loop, held: Held, inputs: Any, most: int = MOST_STEPS) -> tuple[int, Held]:
    """Return the steps that take about LOOP_SECONDS; compiles."""
    _, held = _clock(loop, held, inputs, 1)
    seconds, held = _clock(loop, held, inputs, 1)
    if seconds < LOOP_SECONDS:
        seconds, held = _clock(loop, held, inputs, 10)
        seconds /= 10
    return max(1, min(most, round(LOOP_SECONDS / max(seconds, 1e-7)))), held


def time_ops(
    ops: Mapping[str, Op], empty: Op, held: Held, inputs: Any, rounds: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Time one run of each operation, by round: one call of each in turn, so that what else the machine does falls on
    all of them; returns seconds.

    From each loop's time are taken a call of no steps, and the same steps of a loop around `empty`.

    Args:
        held: given up.
        progress: is called with what is about to be compiled.
    """
    loops, steps = {}, {}
    for name, op in {"": empty, **ops}.items():
        progress(name)
        loops[name] = make_loop(op)
        steps[name], held = count_steps(loops[name], held, inputs)
    runs = len(held)
    seconds: dict[str, list[float]] = {name: [] for name in ops}
    for _ in range(rounds):
        spent = {}
        for name, loop in loops.items():
            call, held = _clock(loop, held, inputs, 0)
            spent[name], held = _clock(loop, held, inputs, steps[name])
            spent[name] = (spent[name] - call) / steps[name]
        for name in ops:
            seconds[name].append(max(spent[name] - spent[""], 0.0) / runs)
    return seconds


def copy_bandwidth(rounds: int = 9) -> float:
    """Return the bytes a second that a pass over an array, in place, reads and writes; median of rounds."""
    size = COPY_BYTES.get(jax.default_backend(), GPU_COPY_BYTES)

    def rewrite(bit: Array, _: None, one: Array) -> tuple[Array, Array]:
        return bit[None], 0.5 * one + 1  # of an output's element XLA for CPUs would make a copy of the whole array

    def nothing(bit: Array, _: None, one: Array) -> tuple[Array, Array]:
        return bit[None], one

    held = (jnp.ones((size // 4,), jnp.float32),)
    seconds = time_ops({"rewrite": rewrite}, nothing, held, None, rounds, lambda name: None)["rewrite"]
    return 2 * size / statistics.median(seconds)
