"""Questions about what lies far back, answered with each method."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int32

from eval.common.cases import EvalCase, describe_part, describe_selection, list_cases
from eval.common.labels import name_methods
from eval.common.record import Record, Row
from eval.common.text_metrics import lcs_rouge, open_package
from eval.methods.base import Method
from eval.model.load import EvalModel, load_eval_model, warn_of_ranges
from eval.model.scores import Context, SequenceScores, perplexity_of, prefill, score_tokens
from eval.needle import NeedleConfig, Variant
from eval.needle.haystack import Haystack, Question
from eval.needle.plot import Panel, plot_grids
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


def check_model(cfg: NeedleConfig, model: EvalModel) -> transformers.PreTrainedTokenizerBase:
    """Return the model's tokenizer; raises InputError where there is none, or where lengths pass the context."""
    limit = model.cfg.max_context
    if over := [length for length in cfg.lengths if length > limit]:
        raise InputError(
            f"lengths {', '.join(map(str, over))} pass the model's context of {limit}; give shorter --lengths"
        )
    if model.tokenizer is None:
        raise InputError(f"{model.source} has no tokenizer, and needles are text; give a real model")
    return model.tokenizer


@dataclasses.dataclass(frozen=True)
class NeedleEvaluator:
    """What asks questions: the model, the text, and the methods."""

    cfg: NeedleConfig
    model: EvalModel
    tokenizer: transformers.PreTrainedTokenizerBase
    haystack: Haystack
    methods: dict[EvalCase, Method]

    def question(self, length: int, depth: float, sample: int) -> Question:
        """Draw a question, the same one for every method."""
        rng = np.random.default_rng([self.cfg.seed, length, round(1e6 * depth), sample])
        return self.haystack.ask(self.cfg.variant, length, depth, rng, self.cfg.passage)

    def prefill(self, question: Question) -> Context:
        """Pass densely over what comes before the question, so that all of one length compile once or twice."""
        slots = _round_up(len(question.prompt))
        capacity = max(self.cfg.lengths) + _WIDTH
        return prefill(self.model, question.prompt, capacity, len(question.tokens), slots)

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _round_up(count: int) -> int:
    return -(-count // _WIDTH) * _WIDTH


def ask(evaluator: NeedleEvaluator, question: Question, case: EvalCase, context: Context) -> tuple[Row, str]:
    """Return the scores of one method's answer, and its text."""
    cfg, model, count = evaluator.cfg, evaluator.model, len(question.answer)
    sparse_from = len(question.prompt) + (len(question.question) if cfg.sparse_from == "answer" else 0)

    def score(after: Int32[np.ndarray, "after"]) -> SequenceScores:
        tokens = np.concatenate([question.question, after])
        width, method = _round_up(len(tokens)), evaluator.methods[case]
        return score_tokens(model, tokens, method, case.selection, context, sparse_from, width)

    scores = score(question.answer)
    asked = slice(-count - 1, -1)  # the queries that predict the answer
    best = scores.best[asked]
    is_right = best == question.answer
    ends = find_stops(model.cfg, evaluator.tokenizer).tokens
    text = evaluator.decode(_generate(score, count, ends) if cfg.generate else best)
    row = {
        "exact": float(is_right.all()),
        "accuracy": float(is_right.mean()),
        "rouge": lcs_rouge(text, evaluator.decode(question.answer))[2],
        "loss": float(-scores.log_probs[-count:].astype(np.float64).mean()),
        "tokens_read": float(scores.tokens_read[asked].mean()),
        "bytes_read": float(scores.bytes_read[asked].mean()),
        "index_bytes": float(scores.index_bytes[asked].mean()),
    }
    return row, text


def _generate(
    score: Callable[[Int32[np.ndarray, "after"]], SequenceScores], count: int, ends: Sequence[int]
) -> Int32[np.ndarray, "tokens"]:
    """Return the most probable tokens one after another, up to `count`; each step scores all of them again."""
    tokens: list[int] = []
    while len(tokens) < count:
        token = int(score(np.asarray(tokens, np.int32)).best[-1])
        if token in ends:
            break
        tokens.append(token)
    return np.asarray(tokens, np.int32)


def ask_cell(evaluator: NeedleEvaluator, cell: Row, cases: Sequence[EvalCase], record: Record) -> None:
    """Ask every question of one length and depth of the methods that are left; their rows go to disk."""
    rows: dict[EvalCase, list[Row]] = {case: [] for case in cases}
    answers: list[Row] = []
    for sample in range(evaluator.cfg.samples):
        question = evaluator.question(cell["length"], cell["depth"], sample)
        context, answer = evaluator.prefill(question), evaluator.decode(question.answer)
        for case in cases:
            record.note(f"{case.method}, {cell['length']} tokens, depth {cell['depth']:g}")
            row, text = ask(evaluator, question, case, context)
            rows[case].append(row)
            answers.append(case.part | cell | {"sample": sample, "wanted": answer, "said": text})
    lines = (json_line(answer) for answer in answers)
    files.append_lines(record.folder.path / "answers.jsonl", "".join(lines))
    for case, measured in rows.items():
        means = {name: float(np.mean([row[name] for row in measured])) for name in measured[0]}
        record.add(case.part | cell, {"samples": evaluator.cfg.samples, **means})


def combine(variant: Variant, rows: Sequence[Row]) -> Row:
    """Average cells; the score is the share of exact answers, of right tokens where a passage is copied."""
    names = ("exact", "accuracy", "rouge", "tokens_read", "bytes_read", "index_bytes")
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}
    score = means["accuracy" if variant == "copy" else "exact"]
    asked = sum(row["samples"] for row in rows)
    return {"score": score, "questions": asked, "ppl": perplexity_of(np.mean([row["loss"] for row in rows])), **means}


def main(cfg: NeedleConfig) -> dict[str, Any]:
    """Ask what is not answered; draw the map, print the table and one line of JSON, whose content is returned."""
    open_package("rouge_score")  # missing, it is reported now, not after the first haystack
    use_compile_cache()
    model = load_eval_model(cfg)
    cfg = dataclasses.replace(cfg, model=model.source)
    warn_of_ranges(model, max(cfg.lengths))
    tokenizer = check_model(cfg, model)
    cases = list_cases(cfg)
    methods = {case: model.open_method(case.method, case.selection, cfg.seed) for case in cases}
    cells: list[Row] = [{"length": length, "depth": depth} for length in cfg.lengths for depth in cfg.depths]
    with Record.open(cfg, cfg.variant) as record:
        haystack = Haystack(cfg.haystack, tokenizer, model.cfg.vocab, 2 * max(cfg.lengths), cfg.text_column)
        evaluator = NeedleEvaluator(cfg, model, tokenizer, haystack, methods)
        left = record.begin([case.part | cell for cell in cells for case in cases])
        for cell in cells:
            if unanswered := [case for case in cases if case.part | cell in left]:
                ask_cell(evaluator, cell, unanswered, record)
        results = [_result(cfg, record, case) for case in cases]
        metric = "ppl" if cfg.variant == "copy" else "score"
        names = name_methods(case.method for case in cases)
        panels = [
            Panel(
                names[case.method] + describe_selection(case.part),
                np.array([[_cell(cfg, record, case, x, y)[metric] for x in cfg.lengths] for y in cfg.depths]),
            )
            for case in cases
        ]
        title = f"{cfg.variant}, {model.source}, {cfg.haystack}"
        label = f"{_LABELS[cfg.variant]}, {cfg.samples} question{'s' * (cfg.samples > 1)} a square"
        plot_grids(record.folder.path / f"{cfg.variant}.png", panels, cfg.lengths, cfg.depths, label, title)
        return record.finish(results, [_table(cfg, results, title)])


def _cell(cfg: NeedleConfig, record: Record, case: EvalCase, length: int, depth: float) -> Row:
    """Return what was measured of one method at one length and depth."""
    row = record.row_of(case.part | {"length": length, "depth": depth})
    assert row is not None
    return combine(cfg.variant, [row])


def _result(cfg: NeedleConfig, record: Record, case: EvalCase) -> Row:
    """Return one method's row of the results: means over all cells, and over those of each length."""
    rows = {
        length: [row for depth in cfg.depths if (row := record.row_of(case.part | {"length": length, "depth": depth}))]
        for length in cfg.lengths
    }
    whole = combine(cfg.variant, [row for found in rows.values() for row in found])
    by_length = {str(length): combine(cfg.variant, found) for length, found in rows.items()}
    return case.part | {"task": cfg.variant} | whole | {"by_length": by_length}


def _score(variant: Variant, row: Row) -> str:
    """Return the perplexity of a copy, else how many of how many answers are exact."""
    return f"{row['ppl']:.2f}" if variant == "copy" else f"{row['exact'] * row['questions']:.0f} of {row['questions']}"


def _table(cfg: NeedleConfig, results: Sequence[Row], title: str) -> Any:
    """Return a table with a line for each method, share and setting, and a column for each length."""
    lengths = [f"{length:,}" for length in cfg.lengths]
    columns = ["method", "keep", "always read", *lengths, "all", "right tokens", "ROUGE-L", "tokens read", "MiB read"]
    lines, names = [], name_methods(row["method"] for row in results)
    for row in results:
        cells = [_score(cfg.variant, found) for found in (*row["by_length"].values(), row)]
        traffic = [f"{row['tokens_read']:,.0f}", f"{row['bytes_read'] / _MIB:.2f}"]
        lines.append([*describe_part(row, names), *cells, f"{row['accuracy']:.0%}", f"{row['rouge']:.3f}", *traffic])
    note = f"{_LABELS[cfg.variant]}; sparse from the {cfg.sparse_from} on"
    return make_table(f"{title}\n{note}", columns, lines, names=3)
