"""What a person sees: progress on stderr, live in a terminal and in plain lines elsewhere, and tables of results."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import rich.table
import rich.text

from spotlight_jax.errors import printable

_FILE_WIDTH = 200  # characters of a line of a table in a file
_PLAIN_EVERY = 10.0  # seconds between plain lines
_TASKS_SHOWN = 4  # the newest is never below a terminal's last line


class _Progress(rich.progress.Progress):
    """Tasks, and a line of its own for the note of the last one: a long one takes no space from bar, count and time."""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        """Yield the newest tasks' lines, then the note, cut at the terminal's width."""
        yield self.make_tasks_table(self.tasks[-_TASKS_SHOWN:])
        if self.tasks and (note := self.tasks[-1].fields["note"]):
            yield rich.text.Text(note, overflow="ellipsis", no_wrap=True)


class _Description(rich.progress.ProgressColumn):
    """Name of a task, cut where the terminal is narrow: numbers are never cut in its place."""

    def __init__(self) -> None:
        super().__init__(rich.table.Column(no_wrap=False))  # such a column gives way before others

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        """Return the name on one line."""
        return rich.text.Text(task.description, overflow="ellipsis", no_wrap=True)


def columns_of(console: rich.console.Console) -> list[rich.progress.ProgressColumn]:
    """Return what the live line shows in a terminal of this width; count and time left at every width."""
    what, count, left = _Description(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()
    if console.width < 60:
        return [what, count, left]
    bar = rich.progress.BarColumn(bar_width=24 if console.width >= 80 else 8)
    return [what, bar, count, rich.progress.TimeElapsedColumn(), left]


class Display:
    """Progress of one task at a time, with a note under it.

    Use it as a context: leaving it takes the live line off the terminal.
    """

    def __init__(self, is_shown: bool = True) -> None:
        """Begin with nothing to show.

        Args:
            is_shown: False where another process of the same run shows it.
        """
        self.console = rich.console.Console(stderr=True, highlight=False)
        self._is_shown = is_shown
        self._live: rich.progress.Progress | None = None
        if is_shown and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = _Progress(*columns_of(self.console), console=self.console)
        self._task = rich.progress.TaskID(0)  # of the live line
        self._what = ""
        self._before = 0  # done when the task began
        self._started = self._last_line = 0.0

    def __enter__(self) -> "Display":
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Show the live line, where there is a terminal."""
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        """Take the live line off the terminal."""
        if self._live is not None:
            with _may_be_closed():
                self._live.stop()

    def begin(self, what: str, done: int, total: int) -> None:
        """Begin a task of which `done` is there already: only what comes after tells how long the rest will take."""
        self._what, self._before = what, done
        self._started = self._last_line = time.monotonic()
        if self._live is not None:
            self._task = self._live.add_task(what, completed=done, total=total, note="")

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far a task is; a new name begins a new one."""
        note = printable(note)
        is_new = what != self._what
        if is_new:
            self.begin(what, done, total)
        if self._live is not None:
            with _may_be_closed():
                self._live.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if is_new or done == total or now - self._last_line >= _PLAIN_EVERY:
            self._last_line = now
            own = done - self._before
            left = (now - self._started) / own * (total - done) if own > 0 else 0.0
            rest = f", {left:.0f} s left" if left else ""
            self.say(f"{what}: {done}/{total}{rest}{'; ' + note if note else ''}")

    def say(self, text: str, is_copied: bool = False) -> None:
        """Print a line that stays; control characters in names are shown, not sent.

        Args:
            is_copied: it holds a command or a path: no line break is put in, which would be copied with it.
        """
        text = printable(text)
        with _may_be_closed():
            if self._live is not None:
                self._live.console.print(text, markup=False, soft_wrap=is_copied)
            elif self._is_shown:
                print(text, file=sys.stderr, flush=True)


def _may_be_closed() -> contextlib.suppress:
    """Suppress errors of a closed terminal or a full disk: progress that nobody can see stops nothing."""
    return contextlib.suppress(OSError)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the line of JSON that ends a command's output, for programs; a terminal, where people read, gets none."""
    if not sys.stdout.isatty():
        print(json.dumps(result), flush=True)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> rich.table.Table:
    """Return a table whose first `names` columns are names and whose others are numbers."""
    table = rich.table.Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < names else "right", no_wrap=place < names)
    for row in rows:
        table.add_row(*row)
    return table


def open_console() -> rich.console.Console:
    """Open the console that tables go to: as wide as the terminal; a file takes lines of any length."""
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, width=_FILE_WIDTH)


def print_table(console: rich.console.Console, table: rich.table.Table) -> None:
    """Print a table; where the terminal is too narrow for its numbers, a block of lines for each of its rows."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    headers = [str(column.header) for column in table.columns]
    least = [
        max([max(map(len, header.split()), default=0), *map(len, own)])
        for header, own in zip(headers, cells, strict=True)
    ]
    if sum(least) + 3 * len(least) + 1 <= console.width:
        console.print(table)
        return
    console.print(rich.text.Text(str(table.title or ""), style="italic"))
    for row in zip(*cells, strict=True):
        first, *others = zip(headers, row, strict=True)
        console.print(rich.text.Text(first[1], style="bold"))
        for header, cell in others:
            console.print(rich.text.Text(f"  {header}: {cell}"))
