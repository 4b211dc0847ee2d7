"""An evaluation's run folder and what a person sees of it: parts that are finished are never measured twice."""

import dataclasses
import json
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import rich.table

from eval.config import FREE_FIELDS
from spotlight_jax import runs
from spotlight_jax.errors import InputError

_PLAIN_EVERY = 10.0  # seconds between plain lines
_FILE_WIDTH = 180

ALL_TEXTS = "all texts"  # the `text` of a row about several
Part = dict[str, Any]  # names one measurement: {"method": ..., "keep": ..., "text": ...}
Row = dict[str, Any]  # a part and what was measured of it


class Record:
    """The rows of one evaluation, on disk as soon as they are measured, and its progress on stderr.

    Use it as a context: leaving it takes the live line off the terminal.
    """

    def __init__(self, folder: runs.RunFolder, name: str) -> None:
        self.folder, self.name = folder, name
        self.rows: list[Row] = folder.metrics()
        self.console = rich.console.Console(stderr=True, highlight=False)
        self._live: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._started = self._last_line = time.monotonic()
        self._done = self._skipped = self._total = 0

    @classmethod
    def open(cls, cfg: Any, name: str, free_fields: Sequence[str] = FREE_FIELDS) -> "Record":
        """The run folder of `cfg.out`, or a new one under runs/; with `cfg.resume` the rows it has.

        Args:
            cfg: a frozen dataclass with `out` and `resume`.
            name: of the evaluation, and of a new folder.
            free_fields: in which a resumed run may differ from how it was started.

        Raises: InputError where the folder is taken, or holds a run with other flags.
        """
        if not cfg.resume:
            path = Path(cfg.out) if cfg.out is not None else runs.next_free(Path("runs"), f"eval-{name}")
            return cls(runs.RunFolder.create(path, cfg), name)
        folder = runs.RunFolder(Path(cfg.out))
        first = folder.config(type(cfg))
        same = dataclasses.replace(first, **{field: getattr(cfg, field) for field in free_fields})
        if changed := runs.differences(same, cfg):
            raise InputError(
                f"the run in '{cfg.out}' was started with other flags ({', '.join(changed)}); "
                "resume with those, or give another --out"
            )
        return cls(folder, name)

    def __enter__(self) -> "Record":
        if self.console.is_terminal:
            columns = [
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
            ]
            self._live = rich.progress.Progress(*columns, console=self.console)
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, parts: Sequence[Part]) -> list[Part]:
        """Say how much there is to do; returns the parts that are not finished."""
        left = [part for part in parts if self.row_of(part) is None]
        self._started = self._last_line = time.monotonic()
        self._total, self._done, self._skipped = len(parts), len(parts) - len(left), len(parts) - len(left)
        if self._skipped:
            self.say(f"{self.name}: {self._skipped} of {len(parts)} parts were finished before")
        if self._live is not None:
            self._task = self._live.add_task(self.name, total=self._total, completed=self._done, note="")
        return left

    def row_of(self, part: Part) -> Row | None:
        """What was measured of a part, or None."""
        for row in self.rows:
            if all(row.get(field) == value for field, value in part.items()):
                return row
        return None

    def add(self, part: Part, measured: Row) -> Row:
        """A part is finished: its row goes to disk."""
        row = part | measured
        self.rows.append(row)
        self.folder.append_metrics(row)
        self._done += 1
        self.note(" ".join(str(value) for value in part.values()))
        return row

    def note(self, text: str) -> None:
        """Show how far the evaluation is, and what is being done."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, note=text)
            return
        now = time.monotonic()
        if self._done == self._total or now - self._last_line >= _PLAIN_EVERY:
            self._last_line = now
            own = self._done - self._skipped
            left = (now - self._started) / own * (self._total - self._done) if own else 0.0
            rest = f", {left:.0f} s left" if left else ""
            print(f"{self.name}: {self._done}/{self._total}{rest}; {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """For those who read texts: what they do."""
        if self._live is None and done < total:
            return
        self.note(f"{what}: {done}/{total}")

    def finish(self, results: Sequence[Row], tables: Sequence[rich.table.Table] = ()) -> dict[str, Any]:
        """Write `summary.json`; print the tables, where everything lies, and the line of JSON that comes last.

        Returns: what the line holds: {"eval", "out", "results": [rows]}.
        """
        summary = {"eval": self.name, "out": str(self.folder.path), "results": list(results)}
        self.folder.write_summary(summary)
        if self._live is not None:
            self._live.stop()
        console = rich.console.Console(highlight=False)
        if not console.is_terminal:  # a file takes lines of any length
            console = rich.console.Console(highlight=False, width=_FILE_WIDTH)
        for table in tables:
            console.print(table)
        self.say(f"written: {self.folder.path}")
        print(json.dumps(summary), flush=True)
        return summary


def file_name(label: str) -> str:
    """A label as one part of a path; no two labels have the same."""
    return urllib.parse.quote(label, safe="@+")


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> rich.table.Table:
    """A table whose first `names` columns are names and whose others are numbers."""
    table = rich.table.Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < names else "right", no_wrap=place < names)
    for row in rows:
        table.add_row(*row)
    return table
