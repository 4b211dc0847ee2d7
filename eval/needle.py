"""Questions about what lies far back, answered as each method reads."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int32

from eval.commands.needle import NeedleConfig, Variant, command
from eval.config import (
    Subject,
    Trial,
    describe_part,
    describe_reading,
    list_trials,
    load_subject,
    say_ranges,
)
from eval.forward import perplexity_of
from eval.haystack import Haystack, Question
from eval.labels import name_methods
from eval.methods.base import Method
from eval.needle_plot import Panel, plot_grids
from eval.prefilled import Prefilled, Tail, pass_tail, prefill
from eval.record import Record, Row
from eval.text_metrics import lcs_rouge
from spotlight_jax import files
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.stops import find_stops
from spotlight_jax.text_files import json_line

_MIB = 2**20
_WIDTH = 64  # what follows a haystack is padded to a multiple of this, so that few shapes are compiled
_LABELS = {
    "needle": "exact answers",
    "passkey": "exact answers",
    "copy": "perplexity of the passage's second copy",
}


def check_subject(cfg: NeedleConfig, subject: Subject) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer; raises InputError where there is none, and for lengths that pass the model's context."""
    limit = subject.cfg.max_context
    if over := [length for length in cfg.lengths if length > limit]:
        raise InputError(
            f"lengths {', '.join(map(str, over))} pass the model's context of {limit}; give shorter --lengths"
        )
    if subject.tokenizer is None:
        raise InputError(f"{subject.source} has no tokenizer, and needles are text; give a real model")
    return subject.tokenizer


@dataclasses.dataclass(frozen=True)
class Desk:
    """What asking needs: the model, the text, and the methods."""

    cfg: NeedleConfig
    subject: Subject
    tokenizer: transformers.PreTrainedTokenizerBase
    haystack: Haystack
    methods: dict[Trial, Method]

    def question(self, length: int, depth: float, sample: int) -> Question:
        """The same one for every method."""
        rng = np.random.default_rng([self.cfg.seed, length, round(1e6 * depth), sample])
        return self.haystack.ask(self.cfg.variant, length, depth, rng, self.cfg.passage)

    def prefill(self, question: Question) -> Prefilled:
        """The dense pass over what comes before the question; padded, so that all of one length compile once or twice.

        What is past the prompt is overwritten or never seen.
        """
        room, count = max(self.cfg.lengths) + _WIDTH, len(question.prompt)
        padded = np.pad(question.prompt, (0, -count % _WIDTH))
        found = prefill(self.subject.params, self.subject.cfg, padded, room, len(question.tokens))
        return dataclasses.replace(found, length=count)

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Their text."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def ask(desk: Desk, question: Question, trial: Trial, prompt: Prefilled) -> tuple[Row, str]:
    """Scores of one method's answer, and its text."""
    cfg, subject, count = desk.cfg, desk.subject, len(question.answer)
    sparse_from = len(question.prompt) + (len(question.question) if cfg.sparse_from == "answer" else 0)

    def pass_on(after: Int32[np.ndarray, "after"]) -> Tail:
        tokens = np.concatenate([question.question, after])
        width = -(-len(tokens) // _WIDTH) * _WIDTH
        method = desk.methods[trial]
        return pass_tail(subject.params, subject.cfg, prompt, tokens, method, trial.selection, sparse_from, width)

    tail = pass_on(question.answer)
    own = slice(-count - 1, -1)  # the queries that foretell the answer
    best = tail.best[own]
    is_right = best == question.answer
    ends = find_stops(subject.cfg, desk.tokenizer).tokens
    text = desk.decode(_write(pass_on, count, ends) if cfg.generate else best)
    row = {
        "exact": float(is_right.all()),
        "accuracy": float(is_right.mean()),
        "rouge": lcs_rouge(text, desk.decode(question.answer))[2],
        "loss": float(-tail.log_probs[-count:].astype(np.float64).mean()),
        "tokens_read": float(tail.tokens_read[own].mean()),
        "bytes_read": float(tail.bytes_read[own].mean()),
        "index_bytes": float(tail.index_bytes[own].mean()),
    }
    return row, text


def _write(
    pass_on: Callable[[Int32[np.ndarray, "after"]], Tail], count: int, ends: Sequence[int]
) -> Int32[np.ndarray, "said"]:
    """The most probable tokens one after another, up to `count`; each step passes over the whole tail again."""
    said: list[int] = []
    while len(said) < count:
        token = int(pass_on(np.asarray(said, np.int32)).best[-1])
        if token in ends:
            break
        said.append(token)
    return np.asarray(said, np.int32)


def ask_cell(desk: Desk, cell: Row, trials: Sequence[Trial], record: Record) -> None:
    """Every question of one length and depth by the methods that are not finished with it; their rows go to disk."""
    rows: dict[Trial, list[Row]] = {trial: [] for trial in trials}
    answers: list[Row] = []
    for sample in range(desk.cfg.samples):
        question = desk.question(cell["length"], cell["depth"], sample)
        prompt, wanted = desk.prefill(question), desk.decode(question.answer)
        for trial in trials:
            record.note(f"{trial.method}, {cell['length']} tokens, depth {cell['depth']:g}")
            row, text = ask(desk, question, trial, prompt)
            rows[trial].append(row)
            answers.append(trial.part | cell | {"sample": sample, "wanted": wanted, "said": text})
    lines = (json_line(answer) for answer in answers)
    files.append_lines(record.folder.path / "answers.jsonl", "".join(lines))
    for trial, measured in rows.items():
        means = {name: float(np.mean([row[name] for row in measured])) for name in measured[0]}
        record.add(trial.part | cell, {"samples": desk.cfg.samples, **means})


def combine(variant: Variant, rows: Sequence[Row]) -> Row:
    """Means over cells; the score is the share of exact answers, of right tokens where a passage is copied."""
    names = ("exact", "accuracy", "rouge", "tokens_read", "bytes_read", "index_bytes")
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}
    score = means["accuracy" if variant == "copy" else "exact"]
    asked = sum(row["samples"] for row in rows)
    return {"score": score, "questions": asked, "ppl": perplexity_of(np.mean([row["loss"] for row in rows])), **means}


def main(cfg: NeedleConfig) -> dict[str, Any]:
    """Ask what is not answered; draw the map, print the table and one line of JSON, whose content is returned."""
    use_compile_cache()
    subject = load_subject(cfg)
    cfg = dataclasses.replace(cfg, model=subject.source)
    say_ranges(subject, max(cfg.lengths))
    tokenizer = check_subject(cfg, subject)
    trials = list_trials(cfg)
    methods = {trial: subject.open_method(trial.method, trial.selection, cfg.seed) for trial in trials}
    cells: list[Row] = [{"length": length, "depth": depth} for length in cfg.lengths for depth in cfg.depths]
    with Record.open(cfg, cfg.variant) as record:
        haystack = Haystack(cfg.haystack, tokenizer, subject.cfg.vocab, 2 * max(cfg.lengths), cfg.text_column)
        desk = Desk(cfg, subject, tokenizer, haystack, methods)
        left = record.begin([trial.part | cell for cell in cells for trial in trials])
        for cell in cells:
            if unanswered := [trial for trial in trials if trial.part | cell in left]:
                ask_cell(desk, cell, unanswered, record)
        results = [_result(cfg, record, trial) for trial in trials]
        metric = "ppl" if cfg.variant == "copy" else "score"
        names = name_methods(trial.method for trial in trials)
        panels = [
            Panel(
                names[trial.method] + describe_reading(trial.part),
                np.array([[_cell(cfg, record, trial, x, y)[metric] for x in cfg.lengths] for y in cfg.depths]),
            )
            for trial in trials
        ]
        title = f"{cfg.variant}, {subject.source}, {cfg.haystack}"
        label = f"{_LABELS[cfg.variant]}, {cfg.samples} question{'s' * (cfg.samples > 1)} a square"
        plot_grids(record.folder.path / f"{cfg.variant}.png", panels, cfg.lengths, cfg.depths, label, title)
        return record.finish(results, [_table(cfg, results, title)])


def _cell(cfg: NeedleConfig, record: Record, trial: Trial, length: int, depth: float) -> Row:
    """What was measured of one method at one length and depth."""
    row = record.row_of(trial.part | {"length": length, "depth": depth})
    assert row is not None
    return combine(cfg.variant, [row])


def _result(cfg: NeedleConfig, record: Record, trial: Trial) -> Row:
    """One method's row of the results: means over all cells, and over those of each length."""
    rows = {
        length: [row for depth in cfg.depths if (row := record.row_of(trial.part | {"length": length, "depth": depth}))]
        for length in cfg.lengths
    }
    whole = combine(cfg.variant, [row for own in rows.values() for row in own])
    by_length = {str(length): combine(cfg.variant, own) for length, own in rows.items()}
    return trial.part | {"task": cfg.variant} | whole | {"by_length": by_length}


def _score(variant: Variant, row: Row) -> str:
    """The perplexity of a copy; else how many of how many answers are exact."""
    return f"{row['ppl']:.2f}" if variant == "copy" else f"{row['exact'] * row['questions']:.0f} of {row['questions']}"


def _table(cfg: NeedleConfig, results: Sequence[Row], title: str) -> Any:
    """A line a method, share and setting; a column a length."""
    lengths = [f"{length:,}" for length in cfg.lengths]
    columns = ["method", "keep", "always read", *lengths, "all", "right tokens", "ROUGE-L", "tokens read", "MiB read"]
    lines, names = [], name_methods(row["method"] for row in results)
    for row in results:
        cells = [_score(cfg.variant, own) for own in (*row["by_length"].values(), row)]
        reads = [f"{row['tokens_read']:,.0f}", f"{row['bytes_read'] / _MIB:.2f}"]
        lines.append([*describe_part(row, names), *cells, f"{row['accuracy']:.0%}", f"{row['rouge']:.3f}", *reads])
    note = f"{_LABELS[cfg.variant]}; sparse from the {cfg.sparse_from} on"
    return make_table(f"{title}\n{note}", columns, lines, names=3)


if __name__ == "__main__":
    sys.exit(command())
