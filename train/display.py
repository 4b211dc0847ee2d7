"""What a person sees during a run: a live line in a terminal, plain lines elsewhere; all of it on stderr."""

import sys
import time
from types import TracebackType

import rich.console
import rich.progress
import rich.table

_PLAIN_EVERY = 10.0  # seconds between plain lines


class Display:
    """Progress of one task at a time, with a note beside it."""

    def __init__(self) -> None:
        self.console = rich.console.Console(stderr=True, highlight=False)
        self._live: rich.progress.Progress | None = None
        if self.console.is_terminal:
            self._live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                console=self.console,
            )
        self._task: tuple[str, rich.progress.TaskID | None] = ("", None)
        self._last_line = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far a task is; a new name starts a new line."""
        if self._live is not None:
            name, task = self._task
            if task is None or name != what:
                task = self._live.add_task(what, total=total, note=note)
                self._task = (what, task)
            self._live.update(task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if what != self._task[0]:
            self._task, self._started, self._last_line = (what, None), now, 0.0
        if done == total or now - self._last_line >= _PLAIN_EVERY:
            self._last_line = now
            left = (now - self._started) / done * (total - done) if done else 0.0
            rest = f", {left:.0f} s left" if 0 < done < total else ""
            print(f"{what}: {done}/{total}{rest}{'; ' + note if note else ''}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> rich.table.Table:
    """A table whose first column is names and whose others are numbers."""
    result = rich.table.Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result
