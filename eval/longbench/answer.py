"""LongBench's questions answered by each method: predictions in its layout, scores, agreement with the dense model."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
import transformers

from eval.common.cases import EvalCase, list_cases
from eval.common.labels import name_methods
from eval.common.record import Record, Row, file_name
from eval.common.text_metrics import open_package
from eval.fidelity import compare_task
from eval.longbench import LongBenchConfig
from eval.longbench.data import Prompt, Sample, available_tasks, chat_tokens, encode_prompt, read_samples
from eval.longbench.predictions import read_predictions
from eval.longbench.score import score_task
from eval.longbench.tasks import CATEGORIES, TASKS, TASKS_E, Task
from eval.model.completion import Completer, open_completer
from eval.model.load import EvalModel, load_eval_model
from spotlight_jax import files
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.text_files import decode_text, json_line, read_json_lines, split_lines

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class LongBenchEvaluator:
    """What answers questions: the model, its tokenizer, and where predictions go."""

    cfg: LongBenchConfig
    model: EvalModel
    tokenizer: transformers.PreTrainedTokenizerBase
    record: Record

    def encode(self, task: Task, sample: Sample) -> Prompt:
        """Encode a question's prompt; without --max-length, as much of it as the context holds."""
        capacity, vocab = self.model.cfg.max_context - task.max_new_tokens, self.model.cfg.vocab
        longest = self.cfg.max_length or capacity - (chat_tokens(self.tokenizer, vocab) if self.cfg.chat else 0)
        return encode_prompt(self.tokenizer, vocab, task, sample, longest, capacity, self.cfg.chat)

    def file(self, case: EvalCase, task: str) -> Path:
        """Return the file of one method's predictions for one task."""
        folder = self.record.folder.path / "predictions" / file_name(label(case))
        return folder / f"{self.cfg.file_name(task)}.jsonl"


def label(case: EvalCase) -> str:
    """Return a short name for a method with its share and setting."""
    if case.keep is None or case.method == "dense":
        return case.method
    always = "" if case.setting == "bare" else "-" + case.setting.replace(" + ", "-").replace(" ", "")
    return f"{case.method}-{case.keep:g}{always}"


def check_capacity(cfg: LongBenchConfig, model: EvalModel, names: Sequence[str]) -> None:
    """Raise InputError for a model without a tokenizer, and for a context that is too short for prompts."""
    if model.tokenizer is None:
        raise InputError(f"{model.source} has no tokenizer, and LongBench is text; give a real model")
    limit, around = model.cfg.max_context, chat_tokens(model.tokenizer, model.cfg.vocab) if cfg.chat else 0
    for name in names:
        new, longest = TASKS[name].max_new_tokens, cfg.max_length or 2
        if longest + around + new > limit:
            raise InputError(
                f"max_length {longest}, {around} tokens of the chat template and {new} new ones of {name} pass the "
                f"model's context of {limit}; give at most --max-length {max(limit - around - new, 0)}"
            )


def answer_task(
    evaluator: LongBenchEvaluator, task: Task, samples: Sequence[Sample], case: EvalCase, completer: Completer
) -> Row:
    """Answer what is not answered yet, one line a question as it comes; returns the row of scores and traffic."""
    file = evaluator.file(case, task.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_lines(file)[: len(samples)]
    files.write_text(file, "".join(line + "\n" for line in done))  # without a line that an interruption cut short
    for number, sample in enumerate(samples[len(done) :], start=len(done) + 1):
        evaluator.record.note(f"{label(case)}, {task.name}, question {number} of {len(samples)}")
        prompt = evaluator.encode(task, sample)
        completion = completer.complete(prompt.tokens, task.max_new_tokens)
        text = str(evaluator.tokenizer.decode(completion.tokens, skip_special_tokens=True))
        if task.name == "samsum":  # a model would go on with dialogues of its own, as LongBench found
            text = text.lstrip("\n").split("\n")[0]
        row = {
            "pred": text,
            "answers": sample.answers,
            "all_classes": sample.classes,
            "length": sample.length,
            "prompt_tokens": len(prompt.tokens),
            "is_cut": prompt.is_cut,
            "tokens_read": completion.tokens_read,
            "bytes_read": completion.bytes_read,
        }
        files.append_lines(file, json_line(row))
    return _row(evaluator, task, file)


def _whole_lines(file: Path) -> list[str]:
    """Return the lines of a file without one that was cut short, perhaps within a character."""
    content = file.read_bytes() if file.exists() else b""
    return split_lines(decode_text(content[: content.rfind(b"\n") + 1], f"'{file}'"))


def _row(evaluator: LongBenchEvaluator, task: Task, file: Path) -> Row:
    """Return a task's score, and what its answers read."""
    score = score_task(task, read_predictions(file), by_length=evaluator.cfg.e)
    rows = [row for row, _ in read_json_lines(file)]
    return {
        "score": score.score,
        "count": score.count,
        **({"by_length": score.by_length} if score.by_length else {}),
        "cut": sum(row["is_cut"] for row in rows),
        "prompt_tokens": statistics.fmean(row["prompt_tokens"] for row in rows),
        "tokens_read": statistics.fmean(row["tokens_read"] for row in rows),
        "bytes_read": statistics.fmean(row["bytes_read"] for row in rows),
    }


def main(cfg: LongBenchConfig) -> dict[str, Any]:
    """Answer and score what is not finished; print a table and one line of JSON, whose content is returned."""
    for name in ("rouge", "rouge_score", "jieba"):
        open_package(name)  # missing ones are reported now, not after hours
    use_compile_cache()
    names = _available(cfg)
    read_samples(cfg.data, cfg.file_name(names[0]), limit=1)  # before a run folder is made and a model is loaded
    model = load_eval_model(cfg)
    cfg = dataclasses.replace(cfg, model=model.source)
    check_capacity(cfg, model, names)
    assert model.tokenizer is not None
    cases = list_cases(cfg)
    with Record.open(cfg, "longbench") as record:
        evaluator = LongBenchEvaluator(cfg, model, model.tokenizer, record)
        if absent := [name for name in cfg.asked_tasks if name not in names]:
            record.say(
                f"{len(names)} of {len(cfg.asked_tasks)} tasks are in '{cfg.data}'; not there: {', '.join(absent)}"
            )
        left = record.begin([case.part | {"task": name} for name in names for case in cases])
        completers = {case: open_completer(model, case.method, case.selection, cfg.seed) for case in cases}
        for name in names:
            unanswered = [case for case in cases if case.part | {"task": name} in left]
            samples = read_samples(cfg.data, cfg.file_name(name), cfg.limit) if unanswered else []
            for case in unanswered:
                row = answer_task(evaluator, TASKS[name], samples, case, completers[case])
                record.add(case.part | {"task": name}, row)
        results = _collect(evaluator, cases, names)
        return record.finish(results, [_table(evaluator, results, cases, names)])


def _available(cfg: LongBenchConfig) -> list[str]:
    """Return the tasks that are there; one that was asked for by name must be."""
    every = TASKS_E if cfg.e else tuple(TASKS)
    files = available_tasks(cfg.data, [cfg.file_name(name) for name in every])
    found = [name for name in every if cfg.file_name(name) in files]
    if missing := [name for name in cfg.tasks if name not in found]:
        raise InputError(f"'{cfg.data}' has no {', '.join(missing)}; it holds {', '.join(found)}")
    return [name for name in cfg.asked_tasks if name in found]


def _collect(evaluator: LongBenchEvaluator, cases: Sequence[EvalCase], names: Sequence[str]) -> list[Row]:
    """Return the rows of all tasks and their mean, with the agreement with the dense model where that answered too."""
    dense = next((case for case in cases if case.method == "dense"), None)
    results: list[Row] = []
    for case in cases:
        rows: list[Row] = []
        for name in names:
            row = evaluator.record.row_of(case.part | {"task": name})
            assert row is not None
            if dense is not None and case != dense:
                row = row | {
                    "fidelity": compare_task(name, evaluator.file(dense, name), evaluator.file(case, name)).score
                }
            rows.append(row)
        fields = [name for name in ("score", "fidelity", "tokens_read", "bytes_read") if name in rows[0]]
        means = {field: statistics.fmean(row[field] for row in rows) for field in fields}
        results += [*rows, case.part | {"task": "mean", "tasks": len(rows)} | means]
    return results


def _table(
    evaluator: LongBenchEvaluator, results: Sequence[Row], cases: Sequence[EvalCase], names: Sequence[str]
) -> rich.table.Table:
    """Return a table with a line for each task and a column for each method; below, means and tokens read."""
    rows = {(label(case), name): row for case in cases for name in (*names, "mean") for row in results
            if all(row[field] == value for field, value in (case.part | {"task": name}).items())}  # fmt: skip
    labels = [label(case) for case in cases]
    lines = [[name, *(f"{rows[one, name]['score']:.2f}" for one in labels)] for name in names]
    for category in CATEGORIES:
        if members := [name for name in names if TASKS[name].category == category]:
            means = [statistics.fmean(rows[one, name]["score"] for name in members) for one in labels]
            lines.append([f"mean: {category}", *(f"{mean:.2f}" for mean in means)])
    mean = [rows[one, "mean"] for one in labels]
    lines.append(["mean: all tasks", *(f"{row['score']:.2f}" for row in mean)])
    lines.append(["agreement with dense", *(f"{row['fidelity']:.3f}" if "fidelity" in row else "-" for row in mean)])
    lines.append(["tokens read", *(f"{row['tokens_read']:,.0f}" for row in mean)])
    lines.append(["MiB read", *(f"{row['bytes_read'] / _MIB:.2f}" for row in mean)])
    first = [rows[labels[0], name] for name in names]
    cut, count = sum(row["cut"] for row in first), sum(row["count"] for row in first)
    note = f"scores of 100; {cut} of {count} prompts lost their middle"
    shown = name_methods(case.method for case in cases)
    titles = [label(dataclasses.replace(case, method=shown[case.method])) for case in cases]
    return make_table(
        f"LongBench{'-E' if evaluator.cfg.e else ''}, {evaluator.model.source}\n{note}", ["task", *titles], lines
    )
