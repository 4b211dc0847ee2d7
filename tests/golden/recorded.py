"""The file that outputs are recorded in, and what machine and program recorded it."""

import hashlib
import json
import os
import pathlib
import platform

import jax
import jaxlib
import numpy as np

from tests.golden.outputs import Outputs, Rule, rule_of

FILE = pathlib.Path(__file__).parent / "golden.npz"
_MACHINE = "machine"  # the array that holds, as JSON, what bits depend on


def describe_machine() -> dict[str, str]:
    """What bits depend on; the processor as a digest of what it says it can do."""
    cpu = pathlib.Path("/proc/cpuinfo")
    said = cpu.read_text() if cpu.exists() else platform.processor()
    abilities = sorted({line for line in said.splitlines() if line.startswith(("flags", "Features", "model name"))})
    return {
        "processor": hashlib.sha256("\n".join(abilities).encode()).hexdigest()[:12],
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", ""),
    }


def write(outputs: Outputs, file: pathlib.Path) -> None:
    """Record outputs as this machine's."""
    np.savez_compressed(file, **outputs, **{_MACHINE: np.asarray(json.dumps(describe_machine()))})


def read(file: pathlib.Path) -> tuple[Outputs, dict[str, str]]:
    """Recorded outputs, and the machine that they are of."""
    with np.load(file) as stored:
        arrays = dict(stored)
    return arrays, json.loads(str(arrays.pop(_MACHINE)))


def compare(found: Outputs, recorded: Outputs, is_exact: bool = False) -> list[str]:
    """A line for each output that is not as recorded."""
    lines = [f"{name} is recorded and was not computed" for name in recorded if name not in found]
    for name, array in found.items():
        if name not in recorded:
            lines.append(f"{name} is not recorded")
        elif is_exact and found[name].tobytes() != recorded[name].tobytes():
            lines.append(f"{name} {Rule().misfits(array, recorded[name]) or 'has other bits'}")
        elif problem := rule_of(name).misfits(array, recorded[name]):
            lines.append(f"{name} {problem}")
    return lines
