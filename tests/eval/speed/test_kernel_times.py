"""Times by kernel: events within events by hand, and a traced program whose loop is known."""

import time
import types

import jax
import jax.numpy as jnp
from jax import lax

from eval.speed.kernel_times import SHOWN, kernel_table, own_seconds, trace_kernels


def event(name, start, duration):
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration)


def test_an_event_is_charged_without_those_within_it():
    events = [
        event("loop", 0, 100),
        event("dot", 10, 20),
        event("add", 12, 5),
        event("dot", 40, 30),
        event("late", 120, 7),
    ]
    own = [(name, round(1e9 * seconds)) for name, seconds in own_seconds(events[::-1])]
    assert own == [("loop", 50), ("dot", 15), ("add", 5), ("dot", 30), ("late", 7)]


def test_kernels_that_overlap_keep_their_times():
    """A GPU's next kernel may begin before the one before it is done."""
    own = own_seconds([event("first", 0, 10), event("second", 8, 10), event("third", 17, 4)])
    assert [round(1e9 * seconds) for _, seconds in own] == [10, 10, 4]


def test_a_loop_launches_its_kernels_in_every_step():
    steps = 7

    @jax.jit
    def run(x):
        return lax.fori_loop(0, steps, lambda step, x: jnp.sort(x + step, axis=-1)[:, ::-1], x)

    x = jax.random.normal(jax.random.key(0), (64, 2048))
    run(x).block_until_ready()
    start = time.perf_counter()
    kernels = trace_kernels(lambda: run(x).block_until_ready(), steps)
    spent = time.perf_counter() - start
    assert "sort" in kernels[0]["kernel"] and kernels[0]["launches"] in (1, 2)  # XLA for CPUs copies before it sorts
    assert sum(kernel["seconds"] for kernel in kernels) < spent / steps
    assert [kernel["seconds"] for kernel in kernels] == sorted((kernel["seconds"] for kernel in kernels), reverse=True)


def test_a_table_sums_up_what_it_does_not_name():
    kernels = [{"kernel": f"k{place}", "launches": 2.0, "seconds": 1e-6, "median": 5e-7} for place in range(SHOWN + 3)]
    table = kernel_table("a step", kernels)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][-2:] == ["3 others", "together"] and len(cells[0]) == SHOWN + 2
    assert cells[1][-2:] == ["6.00", f"{2 * (SHOWN + 3)}.00"] and cells[3][-2:] == ["3.0", f"{SHOWN + 3}.0"]
