"""Where this device's slots lie among those of a sequence whose tokens are split over an axis of the mesh.

Everything that takes an `axis` runs under `shard_map` over it: device i holds the slots from i * slots on. Lengths and
budgets are then of whole sequences, positions are of this device's slots. Without an axis, a device holds them all.
"""

from typing import TypeVar

from jax import lax
from jaxtyping import Array, Int32

Sums = TypeVar("Sums")


def devices_of(axis: str | None) -> int:
    """Return how many devices share each sequence."""
    return 1 if axis is None else int(lax.psum(1, axis))


def first_slot(slots: int, axis: str | None) -> Int32[Array, ""] | int:
    """Return the position of this device's first slot."""
    return 0 if axis is None else lax.axis_index(axis) * slots


def join_sums(sums: Sums, axis: str | None) -> Sums:
    """Return a tree of arrays added up over the devices of the axis."""
    return sums if axis is None else lax.psum(sums, axis)
