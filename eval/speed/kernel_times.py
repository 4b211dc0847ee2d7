"""What a step's time goes to, kernel by kernel, as JAX's profiler sees the device."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
from rich.table import Table

from spotlight_jax.display import make_table

SHOWN = 20  # kernels of a table


class KernelTime(TypedDict):
    """One kernel of a step."""

    kernel: str
    launches: float  # of a step
    seconds: float  # of a step, all launches together
    median: float  # seconds of a launch


def trace_kernels(run: Callable[[], Any], steps: int) -> list[KernelTime]:
    """Return the kernels that ran on the device while `run` did, the longest first; none where the profiler saw none.

    On a CPU a kernel is all operations of a compiled program with one name but for its number, without those that they
    call.

    Args:
        run: waits for its results.
        steps: that it takes.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        [path] = Path(folder).rglob("*.xplane.pb")
        durations: dict[str, list[float]] = {}
        for line in _lines_of_kernels(jax.profiler.ProfileData.from_file(str(path))):
            for name, seconds in own_seconds(line):
                durations.setdefault(name.partition(".")[0], []).append(seconds)
    kernels = [
        KernelTime(
            kernel=name,
            launches=len(seconds) / steps,
            seconds=sum(seconds) / steps,
            median=statistics.median(seconds),
        )
        for name, seconds in durations.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def _lines_of_kernels(data: Any) -> Iterator[list[Any]]:
    """Yield a GPU's streams, or of a CPU's threads what they ran of compiled programs."""
    is_cpu = jax.default_backend() == "cpu"
    for plane in data.planes:
        if not plane.name.startswith("/host:CPU" if is_cpu else "/device:"):
            continue
        for line in plane.lines:
            if is_cpu:
                yield [event for event in line.events if "hlo_op" in dict(event.stats)]
            elif line.name.startswith("Stream"):
                yield list(line.events)


def own_seconds(events: Sequence[Any]) -> list[tuple[str, float]]:
    """Name and time of each event (`jax.profiler.ProfileData`) of one line, less the time of events within it."""
    events = sorted(events, key=lambda event: (event.start_ns, -event.duration_ns))
    alone = [event.duration_ns * 1e-9 for event in events]
    around: list[tuple[float, int]] = []  # end and place of the events that the next one may lie in
    for place, event in enumerate(events):
        end = event.start_ns + event.duration_ns
        while around and around[-1][0] < end:
            around.pop()
        if around:
            alone[around[-1][1]] -= event.duration_ns * 1e-9
        around.append((end, place))
    return [(event.name, seconds) for event, seconds in zip(events, alone, strict=True)]


def kernel_table(title: str, kernels: Sequence[KernelTime]) -> Table:
    """Return a table of the longest kernels by name, and the others together."""
    total = sum(kernel["seconds"] for kernel in kernels)
    others = kernels[SHOWN:]
    rows = []
    for kernel in kernels[:SHOWN]:
        median, seconds = 1e6 * kernel["median"], 1e6 * kernel["seconds"]
        rows.append([kernel["kernel"], f"{kernel['launches']:,.2f}", f"{median:,.2f}", f"{seconds:,.1f}"])
    if others:
        seconds, launches = (sum(kernel[key] for kernel in others) for key in ("seconds", "launches"))
        rows.append([f"{len(others)} others", f"{launches:,.2f}", "", f"{1e6 * seconds:,.1f}"])
    rows.append(["together", f"{sum(kernel['launches'] for kernel in kernels):,.2f}", "", f"{1e6 * total:,.1f}"])
    return make_table(title, ["kernel", "launches", "µs each", "µs a step"], rows)
