"""What the user gave cannot be used; everything else that goes wrong is a bug and keeps its traceback."""


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do; commands exit with code 2."""
