"""What the user gave cannot be used; everything else that goes wrong is a bug and keeps its traceback."""

import dataclasses
from typing import Any

_LARGEST = 3.4e38  # of single precision


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do; commands exit with code 2."""


def check_numbers(cfg: Any) -> None:
    """Raise InputError for the first number of a frozen config that is NaN, infinite, or beyond single precision.

    Every config with a field of real numbers calls this first when it checks itself: no comparison refuses a NaN.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not abs(number) <= _LARGEST:
                raise InputError(f"{field.name} is {number}; give a finite number (single precision ends at 3.4e38)")
