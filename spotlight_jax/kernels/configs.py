"""What a kernel is tuned by on this device: its `Config` in a table by compute capability."""

from collections.abc import Mapping
from typing import TypeVar

import jax

Capability = tuple[int, int]
Config = TypeVar("Config")

A100: Capability = (8, 0)
H100: Capability = (9, 0)


def compute_capability() -> Capability | None:
    """Compute capability of the device that programs run on; None where it has none."""
    said = getattr(jax.devices()[0], "compute_capability", None)
    if said is None:
        return None
    major, minor = (int(number) for number in str(said).split("."))
    return major, minor


def config_here(table: Mapping[Capability | None, Config]) -> Config:
    """Return this device's entry of a table, or the default, which is None's."""
    return table.get(compute_capability(), table[None])
