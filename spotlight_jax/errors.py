"""What the user gave cannot be used; everything else that goes wrong is a bug and keeps its traceback."""

import contextlib
from collections.abc import Iterator

_LONGEST = 2000  # characters of a message; what a file holds may be quoted in it


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do; commands exit with code 2."""

    def __init__(self, message: str) -> None:
        """Take a message, which may quote what a file holds: a terminal shows it and obeys none of it."""
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    """The text on one line of bounded length: blanks for line breaks, escapes for all else that is not printable."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    text = text.translate(dict.fromkeys(map(ord, "\t\n\r"), " "))
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Let the line of an InputError raised within begin with where the trouble is, if it does not yet."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(InputError(f"{where}"))):
            raise
        raise InputError(f"{where}: {error}") from error
