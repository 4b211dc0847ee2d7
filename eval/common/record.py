"""An evaluation's run folder and what a person sees of it: parts that are finished are never measured twice."""

import contextlib
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import rich.table

from eval.common.labels import explain_methods, explain_names
from spotlight_jax import runs
from spotlight_jax.display import Display, open_console, print_result, print_table
from spotlight_jax.errors import InputError

Config = TypeVar("Config")

ALL_TEXTS = "all texts"  # the `text` of a row about several
Part = dict[str, Any]  # names one measurement: {"method": ..., "keep": ..., "text": ...}
Row = dict[str, Any]  # a part and what was measured of it


class Record:
    """The rows of one evaluation, on disk as soon as they are measured, and its progress on stderr.

    Use it as a context: leaving it takes the live line off the terminal, and a folder with nothing in it off the disk
    where the input was refused.
    """

    def __init__(self, folder: runs.RunFolder, name: str, held: contextlib.ExitStack | None = None) -> None:
        self.folder, self.name = folder, name
        self._held = held or contextlib.ExitStack()  # the folder, for this process
        self.rows: list[Row] = folder.metrics()
        self.display = Display()
        self._done = self._total = 0

    @classmethod
    def open(cls, cfg: Any, name: str) -> "Record":
        """Open the run folder of `cfg.out`, or a new one under runs/; with `cfg.resume` with the rows it has.

        Args:
            cfg: a frozen dataclass with `out`, `resume`, and `free_fields`, in which a resumed run may differ.
            name: of the evaluation, and of a new folder.

        Raises: InputError where the folder is taken, or holds a run with other flags.
        """
        if not cfg.resume:
            path = Path(cfg.out) if cfg.out is not None else runs.next_free(Path("runs"), f"eval-{name}")
            runs.RunFolder.check_free(path)
            with contextlib.ExitStack() as held:
                held.enter_context(runs.hold(path))
                return cls(runs.RunFolder.create(path, cfg), name, held.pop_all())
        folder = runs.RunFolder(Path(cfg.out))
        folder.check_resumed(cfg, cfg.free_fields)
        with contextlib.ExitStack() as held:
            held.enter_context(runs.hold(folder.path))
            return cls(folder, name, held.pop_all())

    def __enter__(self) -> "Record":
        self.display.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.display.stop()
        if isinstance(error, InputError):
            self.folder.discard_if_unused()
        self._held.close()

    def begin(self, parts: Sequence[Part]) -> list[Part]:
        """Say how much there is to do; returns the parts that are not finished."""
        left = [part for part in parts if self.row_of(part) is None]
        self._total, self._done = len(parts), len(parts) - len(left)
        if self._done:
            self.say(f"{self.name}: {self._done} of {self._total} parts were finished before")
        self.display.begin(self.name, self._done, self._total)
        return left

    def row_of(self, part: Part) -> Row | None:
        """Return what was measured of a part, or None."""
        for row in self.rows:
            if all(row.get(field) == value for field, value in part.items()):
                return row
        return None

    def add(self, part: Part, measured: Row) -> Row:
        """Finish a part: its row goes to disk."""
        row = part | measured
        self.rows.append(row)
        self.folder.append_metrics(row)
        self._done += 1
        self.note(" ".join(str(value) for value in part.values()))
        return row

    def note(self, text: str) -> None:
        """Show how far the evaluation is, and what is being done."""
        self.display.update(self.name, self._done, self._total, text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.display.say(text)

    def finish(self, results: Sequence[Row], tables: Sequence[rich.table.Table] = ()) -> dict[str, Any]:
        """Write `summary.json`; print the tables, where everything lies, and the line of JSON that comes last.

        Returns: what the line holds: {"eval", "out", "results": [rows]}.
        """
        summary = {"eval": self.name, "out": str(self.folder.path), "results": list(results)}
        self.folder.write_summary(summary)
        self.display.stop()
        console = open_console()
        for table in tables:
            print_table(console, table)
        methods = [row["method"] for row in results if "method" in row]
        for shown, about in (*explain_names(methods), *explain_methods(methods)):
            console.print(f"{shown}: {about}", markup=False, soft_wrap=True)
        self.display.say(f"written: {self.folder.path}", is_copied=True)
        print_result(summary)
        return summary


def file_name(label: str) -> str:
    """Return a label as one part of a path; no two labels have the same."""
    return urllib.parse.quote(label, safe="@+")
