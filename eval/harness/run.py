"""Tasks of lm-evaluation-harness, asked of each method."""

import contextlib
import dataclasses
import difflib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import transformers

from eval.common.cases import EvalCase, describe_part, list_cases
from eval.common.labels import name_methods
from eval.common.record import Record, Row, file_name
from eval.harness import HarnessConfig
from eval.harness.scorer import Scorer, TaskStats
from eval.model.load import EvalModel, load_eval_model
from spotlight_jax import files
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError, first_line
from spotlight_jax.text_files import json_line

EXTRA = "pip install 'spotlight-jax[eval]' (lm_eval, without torch)"


def open_tasks(cfg: HarnessConfig, tokenizer: str, length: int | None = None) -> Any:
    """Open the harness's task manager; raises InputError without the harness, or for a task that it does not have.

    Args:
        cfg: its tasks.
        tokenizer: folder of the tokenizer that tasks make texts with; it may be filled later.
        length: tokens of the texts that tasks make; None: as the tasks define.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the harness's imports
            import datasets
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-evaluation-harness is missing ({error.name}): {EXTRA}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lengths = {} if length is None else {"max_seq_lengths": [length]}
    manager = TaskManager(include_path=cfg.task_folder, metadata={"tokenizer": tokenizer, **lengths})
    for name in cfg.tasks:
        if name not in manager.all_tasks:  # there are thousands
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists what it has"
            raise InputError(f"the harness has no task '{name}'; {hint}")
    return manager


@contextlib.contextmanager
def _running(task: str) -> Iterator[None]:
    """Run the harness's own code quietly; raises InputError where it cannot run the task."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # tasks print how they are made
        warnings.simplefilter("ignore")  # of the harness and of data set loading
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"the harness cannot run task '{task}': {first_line(error)}") from error


def build_task(cfg: HarnessConfig, task: str, manager: Any) -> list[Any]:
    """Build one task or group with its texts, for all methods: RULER's makes 500 of each length, whatever the limit."""
    with _running(task):
        random.seed(cfg.seed)  # as the harness does before it builds a task
        np.random.seed(cfg.seed)
        loaded = manager.load([task])
    return [loaded["groups"][task]] if task in loaded["groups"] else list(loaded["tasks"].values())


def run_task(
    cfg: HarnessConfig, model: EvalModel, case: EvalCase, part: Row, built: list[Any], manager: Any, record: Record
) -> Row:
    """Ask one task or group, as `build_task` gave it, of one method; writes the samples into the run folder."""
    task = part["task"]
    from lm_eval.evaluator import simple_evaluate

    from eval.harness.lm import SpotlightLM

    def progress(done: int, total: int) -> None:
        record.note(f"{case.method} {name_task(part)}: {done}/{total} requests")

    lm = SpotlightLM(Scorer(model, case, cfg.batch, cfg.seed), cfg.max_length, cfg.question_sparse, progress)
    with _running(task):
        found = simple_evaluate(
            model=lm, tasks=built, num_fewshot=cfg.fewshot, limit=cfg.limit, bootstrap_iters=0,
            apply_chat_template=cfg.chat, task_manager=manager, random_seed=cfg.seed,
            numpy_random_seed=cfg.seed, fewshot_random_seed=cfg.seed,
        )  # fmt: skip
    assert found is not None, "one process"
    for line in sorted(lm.unmatched):
        record.say(f"harness: {task}: {line}")
    samples = found.get("samples", {})
    _write_samples(record, case, samples, part.get("length"))
    asked = sum(len({row["doc_id"] for row in rows}) for rows in samples.values())  # a row a document and filter
    return summarise_task(task, found["results"], lm.stats) | {"questions": asked}


def summarise_task(task: str, results: dict[str, dict[str, Any]], stats: dict[str, TaskStats]) -> Row:
    """Summarise a task: its metrics, the first of them as its score, and what was read for all its parts."""
    total = TaskStats()
    for tally in stats.values():
        for field in dataclasses.fields(TaskStats):
            setattr(total, field.name, getattr(total, field.name) + getattr(tally, field.name))
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in results[task].items()
        if isinstance(value, int | float) and "stderr" not in name and name not in ("sample_len", "sample_count")
        if not (value == -1 and name.partition(",")[0].isdigit())  # ruler's, of lengths that were not asked
    }
    if not metrics:  # a group without a score: the mean of its tasks'
        parts = [summarise_task(name, results, {})["score"] for name in results if name != task]
        metrics = {"mean of tasks": sum(parts) / len(parts)}
    name, score = next(iter(metrics.items()))
    return {"metric": name, "score": score, "metrics": metrics, **total.row()}


def _write_samples(
    record: Record, case: EvalCase, samples: dict[str, list[dict[str, Any]]], length: int | None
) -> None:
    folder = record.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    for task, rows in samples.items():
        keep = "" if case.keep is None else f"-{case.keep:g}"
        label = f"{case.method}{keep}-{case.setting.replace(' ', '')}-{task}"
        label += "" if length is None else f"-{length}"
        file = folder / f"{file_name(label)}.jsonl"
        lines = [json_line(row, default=str) for row in rows]
        files.write_text(file, "".join(lines))


def main(cfg: HarnessConfig) -> dict[str, Any]:
    """Ask every task of every method; returns what the last line of stdout holds."""
    lengths = cfg.lengths or (None,)
    with tempfile.TemporaryDirectory() as folder:
        managers = {length: open_tasks(cfg, folder, length) for length in lengths}
        use_compile_cache()
        model = load_eval_model(cfg)
        cfg = dataclasses.replace(cfg, model=model.source)
        check_model(cfg, model).save_pretrained(folder)
        with Record.open(cfg, "harness") as record:
            cases = list_cases(cfg)
            asked: dict[tuple[str, int | None], Row] = {
                (task, length): {"task": task} | ({"length": length} if length else {})
                for task in cfg.tasks
                for length in lengths
            }
            parts = [(case, case.part | question) for case in cases for question in asked.values()]
            left = record.begin([part for _, part in parts])
            for (task, length), question in asked.items():  # a built task serves all methods, and is kept no longer
                own = [(case, part) for case in cases if (part := case.part | question) in left]
                built = build_task(cfg, task, managers[length]) if own else []
                for case, part in own:
                    record.add(part, run_task(cfg, model, case, part, built, managers[length], record))
            rows = [row for _, part in parts if (row := record.row_of(part)) is not None]
            for line in describe_use(rows):
                record.say(f"harness: {line}")
            return record.finish(rows, [_table(cfg, rows)])


def check_model(cfg: HarnessConfig, model: EvalModel) -> transformers.PreTrainedTokenizerBase:
    """Return the model's tokenizer; raises InputError where there is none, or where a length passes the context."""
    if model.tokenizer is None:
        raise InputError(f"{cfg.model} has no tokenizer, and the harness gives texts; name a real model")
    limit = model.cfg.max_context
    if cfg.max_length is not None and cfg.max_length >= limit:
        raise InputError(f"max_length {cfg.max_length} with the token after it passes the model's context of {limit}")
    if over := [length for length in cfg.lengths if length > limit]:
        raise InputError(f"lengths {', '.join(map(str, over))} pass the model's context of {limit}; give shorter ones")
    return model.tokenizer


def name_task(row: Row) -> str:
    """Return a task's name for people: with the length of its texts, where one was asked for."""
    return f"{row['task']} at {row['length']:,}" if "length" in row else row["task"]


def describe_use(rows: Sequence[Row]) -> list[str]:
    """List what a reader must know: tasks that no method's choice took part in, and requests that were cut."""
    lines = []
    sparse = [row for row in rows if row["method"] != "dense"]
    for task in dict.fromkeys(map(name_task, sparse)):
        chosen, scored = (
            sum(row[name] for row in sparse if name_task(row) == task)
            for name in ("tokens_by_selection", "tokens_scored")
        )
        if chosen == 0:
            lines.append(
                f"{task} says nothing about the methods: of {scored} tokens none was scored or chosen by a query that "
                "left tokens out (short contexts, or answers of one token; see --question-sparse)"
            )
        elif chosen < scored:
            lines.append(f"{task}: {chosen} of {scored} tokens were scored or chosen by a query that left tokens out")
    for task in dict.fromkeys(map(name_task, rows)):
        first = next(row for row in rows if name_task(row) == task)
        if first["truncated"]:
            lines.append(
                f"{task}: {first['truncated']} of {first['requests']} requests were too long and lost their beginning"
            )
    return lines


def _table(cfg: HarnessConfig, rows: Sequence[Row]) -> Any:
    columns = ["method", "keep", "always read", "task", "metric", "score", "of", "tokens", "MiB", "by selection"]
    lines, shown = [], name_methods(row["method"] for row in rows)
    for row in rows:
        share = f"{100 * row['tokens_by_selection'] / max(row['tokens_scored'], 1):.0f} %"
        moved = f"{row['bytes_read'] / 2**20:.2f}"
        names = [*describe_part(row, shown), name_task(row), row["metric"]]
        lines.append(
            [*names, f"{row['score']:.4g}", str(row.get("questions", "-")), f"{row['tokens_read']:,.0f}", moved, share]
        )
    note = "of: questions; tokens, MiB: read for a token, mean; "
    note += "by selection: tokens scored or chosen by a query that left tokens out"
    return make_table(f"lm-evaluation-harness, {cfg.model}\n{note}", columns, lines, names=5)
