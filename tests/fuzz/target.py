"""What a fuzz target is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Target:
    """One input format: `write` makes a hostile case in an empty folder, `read` is the product's way to read it."""

    write: Callable[[np.random.Generator, Path], Path]  # returns what `read` is given
    read: Callable[[Path], Any]
