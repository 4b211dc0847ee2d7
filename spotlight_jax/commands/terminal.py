"""What conversations in the terminal share, wherever the model is: reading a line, writing text."""

import contextlib
import io
import sys
from collections.abc import Callable

from rich.console import Console

HELP = "Ctrl-C cuts an answer short, /new starts again, /help shows this, /quit or Ctrl-D ends"


def write_text(text: str) -> None:
    """Write text to stdout at once and as it is: no wrapping, no markup."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_lines() -> None:
    """Let lines be edited, where that can be, and take bytes that are no UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 costs its line, not the conversation
    with contextlib.suppress(ImportError):  # not everywhere
        import readline  # `input` then knows arrow keys and earlier lines

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message


def read_line(read: Callable[[str], str], notes: Console) -> str | None:
    """Return what the user says next; None where the conversation ends."""
    while True:
        try:
            text = read("> ").strip()
        except EOFError:
            write_text("\n")
            return None
        except KeyboardInterrupt:
            write_text("\n")
            notes.print(HELP, markup=False, soft_wrap=True)
            continue
        return None if text == "/quit" else text
