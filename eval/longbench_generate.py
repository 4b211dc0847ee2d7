"""LongBench's questions answered by each method: predictions in its layout, scores, agreement with the dense model."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
import transformers

from eval.config import Subject, Trial, list_trials, load_subject
from eval.decoder import Decoder, open_decoder
from eval.fidelity import compare_task
from eval.labels import name_methods
from eval.longbench import LongBenchConfig
from eval.longbench_data import Prompt, Sample, available_tasks, chat_tokens, encode_prompt, read_samples
from eval.longbench_score import score_task
from eval.longbench_tasks import CATEGORIES, TASKS, TASKS_E, Task
from eval.predictions import read_predictions
from eval.record import Record, Row, file_name
from eval.text_metrics import open_package
from spotlight_jax import files
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.text_files import decode_text, json_line, read_json_lines, split_lines

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Desk:
    """What answering needs: the model, its tokenizer, and where predictions go."""

    cfg: LongBenchConfig
    subject: Subject
    tokenizer: transformers.PreTrainedTokenizerBase
    record: Record

    def encode(self, task: Task, sample: Sample) -> Prompt:
        """A question as the model is asked it; without --max-length, as much of it as the context holds."""
        room, vocab = self.subject.cfg.max_context - task.max_new_tokens, self.subject.cfg.vocab
        longest = self.cfg.max_length or room - (chat_tokens(self.tokenizer, vocab) if self.cfg.chat else 0)
        return encode_prompt(self.tokenizer, vocab, task, sample, longest, room, self.cfg.chat)

    def file(self, trial: Trial, task: str) -> Path:
        """The predictions of one method for one task."""
        folder = self.record.folder.path / "predictions" / file_name(label(trial))
        return folder / f"{self.cfg.file_name(task)}.jsonl"


def label(trial: Trial) -> str:
    """A short name for a method with its share and setting."""
    if trial.keep is None or trial.method == "dense":
        return trial.method
    always = "" if trial.setting == "bare" else "-" + trial.setting.replace(" + ", "-").replace(" ", "")
    return f"{trial.method}-{trial.keep:g}{always}"


def check_room(cfg: LongBenchConfig, subject: Subject, names: Sequence[str]) -> None:
    """Raise InputError for a model without a tokenizer, and for a context that has no room for prompts."""
    if subject.tokenizer is None:
        raise InputError(f"{subject.source} has no tokenizer, and LongBench is text; give a real model")
    limit, around = subject.cfg.max_context, chat_tokens(subject.tokenizer, subject.cfg.vocab) if cfg.chat else 0
    for name in names:
        new, wanted = TASKS[name].max_new_tokens, cfg.max_length or 2
        if wanted + around + new > limit:
            raise InputError(
                f"max_length {wanted}, {around} tokens of the chat template and {new} new ones of {name} pass the "
                f"model's context of {limit}; give at most --max-length {max(limit - around - new, 0)}"
            )


def answer_task(desk: Desk, task: Task, samples: Sequence[Sample], trial: Trial, decoder: Decoder) -> Row:
    """Answer what is not answered yet, one line a question as it comes; returns the row of scores and reads."""
    file = desk.file(trial, task.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_lines(file)[: len(samples)]
    files.write_text(file, "".join(line + "\n" for line in done))  # without a line that an interruption cut short
    for number, sample in enumerate(samples[len(done) :], start=len(done) + 1):
        desk.record.note(f"{label(trial)}, {task.name}, question {number} of {len(samples)}")
        prompt = desk.encode(task, sample)
        written = decoder.write(prompt.tokens, task.max_new_tokens)
        text = str(desk.tokenizer.decode(written.tokens, skip_special_tokens=True))
        if task.name == "samsum":  # a model would go on with dialogues of its own, as LongBench found
            text = text.lstrip("\n").split("\n")[0]
        row = {
            "pred": text,
            "answers": sample.answers,
            "all_classes": sample.classes,
            "length": sample.length,
            "prompt_tokens": len(prompt.tokens),
            "is_cut": prompt.is_cut,
            "tokens_read": written.tokens_read,
            "bytes_read": written.bytes_read,
        }
        files.append_lines(file, json_line(row))
    return _row(desk, task, file)


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file without one that was cut short, perhaps within a character."""
    content = file.read_bytes() if file.exists() else b""
    return split_lines(decode_text(content[: content.rfind(b"\n") + 1], f"'{file}'"))


def _row(desk: Desk, task: Task, file: Path) -> Row:
    """A task's score, and what its answers read."""
    score = score_task(task, read_predictions(file), by_length=desk.cfg.e)
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
        open_package(name)  # missing ones are told now, not after hours
    use_compile_cache()
    names = _available(cfg)
    read_samples(cfg.data, cfg.file_name(names[0]), limit=1)  # before a run folder is made and a model is loaded
    subject = load_subject(cfg)
    cfg = dataclasses.replace(cfg, model=subject.source)
    check_room(cfg, subject, names)
    assert subject.tokenizer is not None
    trials = list_trials(cfg)
    with Record.open(cfg, "longbench") as record:
        desk = Desk(cfg, subject, subject.tokenizer, record)
        if absent := [name for name in cfg.wanted if name not in names]:
            record.say(f"{len(names)} of {len(cfg.wanted)} tasks are in '{cfg.data}'; not there: {', '.join(absent)}")
        left = record.begin([trial.part | {"task": name} for name in names for trial in trials])
        decoders = {trial: open_decoder(subject, trial.method, trial.selection, cfg.seed) for trial in trials}
        for name in names:
            unanswered = [trial for trial in trials if trial.part | {"task": name} in left]
            samples = read_samples(cfg.data, cfg.file_name(name), cfg.limit) if unanswered else []
            for trial in unanswered:
                row = answer_task(desk, TASKS[name], samples, trial, decoders[trial])
                record.add(trial.part | {"task": name}, row)
        results = _collect(desk, trials, names)
        return record.finish(results, [_table(desk, results, trials, names)])


def _available(cfg: LongBenchConfig) -> list[str]:
    """Those of the tasks that are there; one that was asked for by name must be."""
    every = TASKS_E if cfg.e else tuple(TASKS)
    files = available_tasks(cfg.data, [cfg.file_name(name) for name in every])
    found = [name for name in every if cfg.file_name(name) in files]
    if missing := [name for name in cfg.tasks if name not in found]:
        raise InputError(f"'{cfg.data}' has no {', '.join(missing)}; it holds {', '.join(found)}")
    return [name for name in cfg.wanted if name in found]


def _collect(desk: Desk, trials: Sequence[Trial], names: Sequence[str]) -> list[Row]:
    """Rows of all tasks and their mean, with the agreement with the dense model where that answered too."""
    dense = next((trial for trial in trials if trial.method == "dense"), None)
    results: list[Row] = []
    for trial in trials:
        rows: list[Row] = []
        for name in names:
            row = desk.record.row_of(trial.part | {"task": name})
            assert row is not None
            if dense is not None and trial != dense:
                row = row | {"fidelity": compare_task(name, desk.file(dense, name), desk.file(trial, name)).score}
            rows.append(row)
        fields = [name for name in ("score", "fidelity", "tokens_read", "bytes_read") if name in rows[0]]
        means = {field: statistics.fmean(row[field] for row in rows) for field in fields}
        results += [*rows, trial.part | {"task": "mean", "tasks": len(rows)} | means]
    return results


def _table(desk: Desk, results: Sequence[Row], trials: Sequence[Trial], names: Sequence[str]) -> rich.table.Table:
    """A line a task, a column a method; categories, means and reads below."""
    rows = {(label(trial), name): row for trial in trials for name in (*names, "mean") for row in results
            if all(row[field] == value for field, value in (trial.part | {"task": name}).items())}  # fmt: skip
    labels = [label(trial) for trial in trials]
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
    shown = name_methods(trial.method for trial in trials)
    titles = [label(dataclasses.replace(trial, method=shown[trial.method])) for trial in trials]
    return make_table(f"LongBench{'-E' if desk.cfg.e else ''}, {desk.subject.source}\n{note}", ["task", *titles], lines)
