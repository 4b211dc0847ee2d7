"""Folders of predictions in LongBench's layout: one `<task>.jsonl` a task, one prediction a line.

A line is `{"pred": "...", "answers": ["..."], "all_classes": ["..."] or null, "length": 4321}`; what else it holds is
not read here.
"""

import dataclasses
from pathlib import Path
from typing import Any

from spotlight_jax.errors import InputError
from spotlight_jax.text_files import read_json_lines


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model's answer, and the right ones."""

    text: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]  # all class names, where the task is to name one
    length: int | None  # of the context: words, or characters of Chinese; as the data set says
    where: str  # file and line, for errors


def find_files(folder: Path) -> dict[str, Path]:
    """Return the folder's prediction files by name; raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder; give one that holds a <task>.jsonl for each task")
    files = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    if not files:
        inner = sorted({file.parent.name for file in folder.glob("*/*.jsonl")})
        hint = f"; give a folder in it: {', '.join(inner[:8])}" if inner else ""
        raise InputError(f"'{folder}' holds no predictions (<task>.jsonl){hint}")
    return files


def find_folders(folder: Path) -> list[Path]:
    """Return the folder, or where it holds one for each method (as a run's `predictions/` does), those."""
    inner = sorted({file.parent for file in folder.glob("*/*.jsonl")})
    return inner if inner and not any(folder.glob("*.jsonl")) else [folder]


def read_predictions(file: Path) -> list[Prediction]:
    """Read a file; raises InputError that names the file and line of what is missing or malformed."""
    found = [_parse(row, where) for row, where in read_json_lines(file)]
    if not found:
        raise InputError(f"'{file}' holds no predictions")
    return found


def _parse(row: dict[str, Any], where: str) -> Prediction:
    if missing := [name for name in ("pred", "answers") if name not in row]:
        raise InputError(f"'{where}' has no '{missing[0]}', only {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(row["pred"], str):
        raise InputError(f"'{where}': 'pred' is not text but {type(row['pred']).__name__}")
    answers, classes, length = row["answers"], row.get("all_classes"), row.get("length")
    check_answers(answers, classes, length, where)
    return Prediction(row["pred"], tuple(answers), tuple(classes or ()), length, where)


def check_answers(answers: Any, classes: Any, length: Any, where: str) -> None:
    """Raise InputError where what LongBench gives with a question is not of the types that it has."""
    if not _is_texts(answers) or not answers:
        raise InputError(f"'{where}': 'answers' is not a list of at least one text")
    if classes is not None and not _is_texts(classes):
        raise InputError(f"'{where}': 'all_classes' is neither null nor a list of texts")
    if length is not None and (type(length) is not int or length < 0):
        raise InputError(f"'{where}': 'length' is not a whole number of words but {length!r}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
