"""What the user gave cannot be used; everything else that goes wrong is a bug and keeps its traceback."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

_LARGEST = 3.4e38  # of single precision
_LARGEST_COUNT = 2**31 - 1
_LARGEST_SEED = 2**32 - 1  # JAX takes 32 bits of a seed: larger ones would draw what smaller ones draw
_LONGEST = 2000  # characters of a message; what a file holds may be quoted in it


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do; commands exit with code 2."""

    def __init__(self, message: str) -> None:
        """Take a message, which may quote what a file holds: a terminal shows it and obeys none of it."""
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    """Return the text on one line of bounded length: blanks for line breaks, escapes for all else not printable."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return printable(text.translate(dict.fromkeys(map(ord, "\t\n\r"), " ")))


def printable(text: str) -> str:
    """Return the text with control characters shown and not sent: a file's name must not steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Let the line of an InputError raised within begin with where the trouble is, if it does not yet."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(InputError(f"{where}"))):
            raise
        raise InputError(f"{where}: {error}") from error


def check_numbers(cfg: Any) -> None:
    """Raise InputError for the first number of a frozen config that is NaN, infinite, or beyond what it is kept in.

    Every config of flags calls this first when it checks itself: no comparison refuses a NaN, and a device's whole
    numbers have 32 bits.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not abs(number) <= _LARGEST:
                raise InputError(f"{field.name} is {number}; give a finite number (single precision ends at 3.4e38)")
            if field.name == "seed" and not 0 <= number <= _LARGEST_SEED:
                raise InputError(f"seed is {number}; give a whole number from 0 to {_LARGEST_SEED}")
            if field.name != "seed" and isinstance(number, int) and not abs(number) <= _LARGEST_COUNT:
                raise InputError(f"{field.name} is {number}; give a whole number of at most {_LARGEST_COUNT}")
