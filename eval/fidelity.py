"""How far the answers of two prediction folders agree: a sparse method's compared with the dense model's.

    python -m eval.fidelity runs/longbench/predictions/dense runs/longbench/predictions/spotlight-0.02

Of each pair of answers: ROUGE-L's precision of one against the other and of the other against the one, and the mean of
both (so which folder comes first does not matter); equal answers count 1. Means are over a task's answers, then over
tasks. `--plain` drops the rule for equal answers. Needs no model and no JAX.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
import tyro

from eval.common.text_metrics import agreement
from eval.longbench.predictions import find_files, read_predictions
from spotlight_jax import cli
from spotlight_jax.display import open_console, print_result, print_table
from spotlight_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class FidelityConfig:
    """Which answers are compared."""

    reference: tyro.conf.Positional[Path]
    """Folder of the dense model's predictions, a `<task>.jsonl` for every task."""
    predictions: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of predictions to compare with it."""
    plain: bool = False
    """ROUGE-L alone: equal answers without any word (both empty) count 0."""


@dataclasses.dataclass(frozen=True)
class TaskFidelity:
    """How far two models agree on one task."""

    task: str
    score: float  # of 1
    identical: float  # share of answers that are equal
    count: int


def compare_task(task: str, reference: Path, other: Path, plain: bool = False) -> TaskFidelity:
    """Compare two files line by line; raises InputError where they are not about the same questions."""
    first, second = read_predictions(reference), read_predictions(other)
    if len(first) != len(second):
        raise InputError(
            f"'{reference}' has {len(first)} predictions and '{other}' has {len(second)}; both must answer the same"
        )
    for one, two in zip(first, second, strict=True):
        if one.answers != two.answers:
            raise InputError(f"'{one.where}' and '{two.where}' answer different questions; keep both in one order")
    pairs = [(one.text, two.text) for one, two in zip(first, second, strict=True)]
    scores = [agreement(one, two, plain) for one, two in pairs]
    identical = statistics.fmean(one == two for one, two in pairs)
    return TaskFidelity(task, statistics.fmean(scores), identical, len(pairs))


def compare_folders(reference: Path, other: Path, plain: bool = False) -> tuple[list[TaskFidelity], list[str]]:
    """Return the agreement on each task that both folders hold, and the tasks that only one of them holds."""
    first, second = find_files(reference), find_files(other)
    common = [name for name in first if name in second]
    if not common:
        raise InputError(
            f"no task is in both: '{reference}' holds {', '.join(first)}, and '{other}' {', '.join(second)}"
        )
    found = [compare_task(name, first[name], second[name], plain) for name in common]
    return found, sorted(first.keys() ^ second.keys())


def main(cfg: FidelityConfig) -> dict[str, Any]:
    """Compare, print a table of each folder and one line of JSON; returns what the line holds."""
    if not cfg.predictions:
        raise InputError("give a folder of predictions to compare with the reference")
    console = open_console()
    results: list[dict[str, Any]] = []
    for folder in cfg.predictions:
        tasks, alone = compare_folders(cfg.reference, folder, cfg.plain)
        mean = statistics.fmean(task.score for task in tasks)
        identical = statistics.fmean(task.identical for task in tasks)
        print_table(console, _table(f"{folder} compared with {cfg.reference}", tasks, mean, identical))
        if alone:
            console.print(f"{len(tasks)} tasks are in both folders; left out: {', '.join(alone)}")
        rows = [
            {"task": task.task, "score": task.score, "identical": task.identical, "count": task.count} for task in tasks
        ]
        rows.append({"task": "mean", "score": mean, "identical": identical, "tasks": len(tasks)})
        results += [{"method": folder.name, **row} for row in rows]
    print_result({"results": results})
    return {"results": results}


def _table(title: str, tasks: list[TaskFidelity], mean: float, identical: float) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("task")
    for name in ("answers", "ROUGE-L agreement", "identical"):
        table.add_column(name, justify="right")
    for task in tasks:
        table.add_row(task.task, str(task.count), f"{task.score:.3f}", f"{task.identical:.0%}")
    table.add_section()
    table.add_row("mean over tasks", "", f"{mean:.3f}", f"{identical:.0%}", style="bold")
    return table


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval fidelity`."""
    return cli.run(main, FidelityConfig, "spotlight eval fidelity", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
