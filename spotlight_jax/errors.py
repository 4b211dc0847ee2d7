"""What the user gave cannot be used; everything else that goes wrong is a bug and keeps its traceback."""


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do; commands exit with code 2."""


def printable(text: str) -> str:
    """Text whose control characters are shown and not sent: a file's name must not steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
