"""Scores of predictions for LongBench's tasks by its published metrics; needs no model and no JAX."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import rich.progress
import rich.table
import tyro

from eval.common.text_metrics import CLASSIFICATION, score_answers
from eval.longbench.predictions import Prediction, find_files, find_folders, read_predictions
from eval.longbench.tasks import CATEGORIES, TASKS, Task, find_task
from spotlight_jax.display import open_console, print_result, print_table
from spotlight_jax.errors import InputError

# LongBench-E's groups by the context's length in words: name, and the length from which the next one starts
LENGTH_GROUPS = (("0-4k", 4000), ("4-8k", 8000), ("8k+", float("inf")))

# How LongBench calls its metrics
_NAMES = {
    "token_f1": "F1",
    "rouge_l": "ROUGE-L",
    "classification": "accuracy",
    "count": "accuracy",
    "retrieval": "accuracy",
    "code_similarity": "similarity",
}


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Which predictions are scored."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of predictions, each with a `<task>.jsonl` for every task, or with such a folder for each method."""
    tasks: tuple[str, ...] = ()
    """Tasks to score; without it, all that are there."""
    by_length: bool = False
    """Add a score for contexts of 0-4k, 4-8k and more words, as LongBench-E reports."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One task's score: the mean over its predictions, of 100."""

    task: Task
    score: float
    count: int
    by_length: dict[str, float | None]  # of each group; None where it is empty; {} where nobody asked


def score_prediction(task: Task, prediction: Prediction) -> float:
    """Return one prediction's score, of 1: the best over its answers."""
    text = prediction.text.lstrip("\n").split("\n")[0] if task.is_one_line else prediction.text
    if task.metric == CLASSIFICATION and not prediction.classes:
        raise InputError(f"'{prediction.where}' has no 'all_classes', which {task.name} needs")
    try:
        return score_answers(task.metric, text, prediction.answers, prediction.classes)
    except InputError as error:
        raise InputError(f"'{prediction.where}': {error}") from None


def score_task(task: Task, predictions: list[Prediction], by_length: bool = False) -> TaskScore:
    """Return a task's score, rounded to hundredths as LongBench does."""
    scores = [score_prediction(task, prediction) for prediction in predictions]
    groups: dict[str, list[float]] = {name: [] for name, _ in LENGTH_GROUPS} if by_length else {}
    if by_length:
        for prediction, score in zip(predictions, scores, strict=True):
            if prediction.length is None:
                raise InputError(f"'{prediction.where}' has no 'length', which scores by length need")
            groups[next(name for name, end in LENGTH_GROUPS if prediction.length < end)].append(score)
    means = {name: _percent(group) if group else None for name, group in groups.items()}
    return TaskScore(task, _percent(scores), len(scores), means)


def score_folder(folder: Path, tasks: tuple[str, ...] = (), by_length: bool = False) -> list[TaskScore]:
    """Return the scores of the tasks that a folder holds, in LongBench's order.

    Raises:
        InputError: a file of no task (with the nearest name), a task asked for that is not there, or a bad line.
    """
    found = find_files(folder)
    files = {find_task(name.removesuffix("_e")).name: file for name, file in found.items()}
    if len(files) < len(found):
        raise InputError(f"'{folder}' holds a task and its LongBench-E form; keep them in separate folders")
    chosen = [find_task(name).name for name in tasks] or list(files)
    if missing := [name for name in chosen if name not in files]:
        raise InputError(f"'{folder}' has no predictions for {', '.join(missing)}; it holds {', '.join(files)}")
    ordered = [name for name in TASKS if name in chosen]
    stderr = rich.console.Console(stderr=True)
    what = f"scoring {folder.name}"  # long summaries take a minute a task
    shown = rich.progress.track(ordered, what, console=stderr, transient=True, disable=not stderr.is_terminal)
    return [score_task(TASKS[name], read_predictions(files[name]), by_length) for name in shown]


def main(cfg: ScoreConfig) -> dict[str, Any]:
    """Score the folders, print a table of each and one line of JSON; returns what the line holds."""
    if not cfg.folders:
        raise InputError("give at least one folder of predictions")
    console = open_console()
    results = []
    for folder in (inner for given in cfg.folders for inner in find_folders(given)):
        scores = score_folder(folder, cfg.tasks, cfg.by_length)
        print_table(console, table_of(f"{folder}: scores of 100", scores))
        if absent := [name for name in TASKS if name not in {score.task.name for score in scores}]:
            console.print(
                f"{len(scores)} of {len(TASKS)} tasks; the mean is over these. Not scored: {', '.join(absent)}"
            )
        results += [row_of(folder.name, score) for score in scores]
        results.append({"method": folder.name, "task": "mean", "score": mean_of(scores), "tasks": len(scores)})
    print_result({"results": results})
    return {"results": results}


def row_of(method: str, score: TaskScore) -> dict[str, Any]:
    """Return a row of the results."""
    row = {"method": method, "task": score.task.name, "score": score.score, "count": score.count}
    return {**row, "by_length": score.by_length} if score.by_length else row


def mean_of(scores: list[TaskScore]) -> float:
    """Return the mean over tasks, each counted once."""
    return round(statistics.fmean(score.score for score in scores), 2)


def table_of(title: str, scores: list[TaskScore]) -> rich.table.Table:
    """Return a table of tasks by category, the mean of each category, and the mean of all tasks."""
    groups = list(scores[0].by_length)
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    for name in ("texts", "score", *groups):
        table.add_column(name, justify="right", no_wrap=True)
    for category in CATEGORIES:
        members = [score for score in scores if score.task.category == category]
        for score in members:
            cells = [
                f"{score.score:.2f}",
                *("-" if mean is None else f"{mean:.2f}" for mean in score.by_length.values()),
            ]
            table.add_row(score.task.name, _NAMES[score.task.metric.removesuffix("_zh")], str(score.count), *cells)
        if members:
            table.add_row(category, "mean", "", f"{mean_of(members):.2f}", *[""] * len(groups), style="bold")
            table.add_section()
    table.add_row("all tasks", "mean", "", f"{mean_of(scores):.2f}", *[""] * len(groups), style="bold")
    return table


def _percent(scores: list[float]) -> float:
    return round(100 * statistics.fmean(scores), 2)
