"""Perplexity of texts, each query reading what a method selects."""

import dataclasses
import math
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from eval.common.by_position import Bucket, buckets_of, combine_buckets, mean_by_position
from eval.common.cases import EvalCase, describe_part, list_cases
from eval.common.labels import name_methods
from eval.common.pictures import plot_positions, plot_tradeoff
from eval.common.record import ALL_TEXTS, Record, Row
from eval.model.load import EvalModel, load_eval_model, warn_of_ranges
from eval.model.scores import Sequence, SequenceScores, check_length, perplexity_of, score_sequence
from eval.perplexity import PerplexityConfig
from eval.perplexity.copy_text import copy_texts
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import read_windows
from spotlight_jax.display import make_table

_MIB = 2**20


def read_sequences(cfg: PerplexityConfig, model: EvalModel, record: Record) -> dict[str, Int32[np.ndarray, "n length"]]:
    """Return the token ids of each text's documents."""
    window = cfg.copy.window if cfg.copy_test else cfg.window
    data = DataConfig(
        train=cfg.texts, window=window, held_out_windows=cfg.windows_per_text, text_column=cfg.text_column
    )
    windows = read_windows(data, model.tokenizer, model.cfg.vocab, record.display.update)
    return copy_texts(windows, cfg.copy) if cfg.copy_test else windows


def measure(passes: Several[SequenceScores], first_scored: int) -> Row:
    """Return perplexity and traffic of some documents; entry i - 1 of a pass is about token i."""
    scored = slice(first_scored - 1, None)
    losses = [-np.asarray(passed.log_probs[scored], np.float64) for passed in passes]

    def mean(name: str) -> float:
        return float(np.mean([getattr(passed, name)[:-1][scored] for passed in passes]))

    buckets = []
    for passed, loss in zip(passes, losses, strict=True):
        positions = np.arange(len(passed.log_probs))[scored]  # of the queries
        buckets.append(mean_by_position({"loss": loss}, positions, len(passed.tokens_read)))
    return {
        "ppl": float(np.mean([perplexity_of(loss.mean()) for loss in losses])),
        "ppl_pooled": perplexity_of(np.concatenate(losses).mean()),
        "documents": len(losses),
        "tokens_scored": sum(loss.size for loss in losses),
        "tokens_read": round(mean("tokens_read"), 2),
        "bytes_read": round(mean("bytes_read")),
        "index_bytes": round(mean("index_bytes")),
        "estimated": round(mean("estimated"), 5),
        "by_position": _combine_positions(buckets),
    }


def _combine_positions(rows: Several[Several[Bucket]]) -> list[Bucket]:
    """Return buckets with the mean loss of their tokens, and the perplexity that it is."""
    combined = combine_buckets(rows, ("loss",))
    return [bucket | {"ppl_pooled": perplexity_of(bucket["loss"])} for bucket in combined]


def combine(rows: Several[Row]) -> Row:
    """Combine the rows of several texts: the mean over all documents, and the perplexity of all tokens together."""
    documents = [row["documents"] for row in rows]
    scored = [row["tokens_scored"] for row in rows]
    loss = np.average([math.log(row["ppl_pooled"]) for row in rows], weights=scored)

    def mean(name: str) -> float:
        return float(np.average([row[name] for row in rows], weights=scored))

    return {
        "ppl": float(np.average([row["ppl"] for row in rows], weights=documents)),
        "ppl_pooled": perplexity_of(loss),
        "documents": sum(documents),
        "tokens_scored": sum(scored),
        "tokens_read": round(mean("tokens_read"), 2),
        "bytes_read": round(mean("bytes_read")),
        "index_bytes": round(mean("index_bytes")),
        **({"estimated": round(mean("estimated"), 5)} if all("estimated" in row for row in rows) else {}),
        "by_position": _combine_positions([buckets_of(row) for row in rows]),
    }


def main(cfg: PerplexityConfig) -> dict[str, Any]:
    """Measure every part that is not finished; print the table and the line of JSON, which is returned."""
    use_compile_cache()
    model = load_eval_model(cfg)
    cfg = dataclasses.replace(cfg, model=model.source)
    check_length(cfg.length, model.cfg, "a copy text" if cfg.copy_test else "the window")
    warn_of_ranges(model, cfg.length)
    with Record.open(cfg, "copy" if cfg.copy_test else "perplexity") as record:
        texts = read_sequences(cfg, model, record)
        cases = list_cases(cfg)
        parts = {name: [case.part | {"text": name} for case in cases] for name in texts}
        left = record.begin([part for listed in parts.values() for part in listed])
        for name, windows in texts.items():
            sequences = [Sequence(window) for window in windows]  # streams of one text at a time
            for case, part in zip(cases, parts[name], strict=True):
                if part in left:
                    record.add(part, measure(_pass_all(cfg, model, sequences, case, record), cfg.first_scored))
        results = _collect(record, cases, list(texts))
        overall = [row for row in results if row["text"] == (ALL_TEXTS if len(texts) > 1 else next(iter(texts)))]
        metric = "perplexity of the second copy" if cfg.copy_test else "perplexity"
        shown = ", ".join(text.removeprefix("text:") for text in texts)
        title = f"{model.source}, {cfg.length:,} tokens, {shown}"
        picture = record.folder.path / "perplexity.png"
        plot_tradeoff(picture, overall, "ppl_pooled", f"{metric}, all tokens together", title)
        _draw_positions(record.folder.path / "by_position.png", overall, metric, title)
        return record.finish(results, _tables(cfg, results, list(texts), title))


def _draw_positions(path: Path, rows: Several[Row], metric: str, title: str) -> None:
    """Draw perplexity by position over that of the dense model, or itself where that was not measured."""
    dense = next((buckets_of(row) for row in rows if row["method"] == "dense"), None)
    if dense is None:
        plot_positions(path, rows, {"ppl_pooled": metric}, title, is_low_better=True)
        return
    ratios = [
        row | {"by_position": [
            bucket | {"ratio": bucket["ppl_pooled"] / whole["ppl_pooled"]}
            for bucket, whole in zip(buckets_of(row), dense, strict=True)
        ]}
        for row in rows
    ]  # fmt: skip
    plot_positions(path, ratios, {"ratio": f"{metric} over dense"}, title, is_low_better=True)


def _pass_all(
    cfg: PerplexityConfig, model: EvalModel, sequences: Several[Sequence], case: EvalCase, record: Record
) -> list[SequenceScores]:
    method = model.open_method(case.method, case.selection, cfg.seed)
    passes = []
    for sequence in sequences:
        record.note(" ".join(str(value) for value in case.part.values()))
        passes.append(score_sequence(model, sequence, method, case.selection, cfg))
    return passes


def _collect(record: Record, cases: Several[EvalCase], texts: Several[str]) -> list[Row]:
    """Return the rows that were asked for, with one over all texts where there are several."""
    results = []
    for case in cases:
        rows = [row for text in texts if (row := record.row_of(case.part | {"text": text}))]
        results += rows
        if len(texts) > 1:
            results.append(case.part | {"text": ALL_TEXTS} | combine(rows))
    return results


def _tables(cfg: PerplexityConfig, results: Several[Row], texts: Several[str], title: str) -> list[Any]:
    """Return a table with a line for each method, share and setting, and a column for each text."""
    rule = "budgets of the whole length" if cfg.whole_length else "budgets of each prefix"
    if cfg.dense_prefix:
        rule += f", the first {cfg.dense_prefix} positions dense"
    names = [text.removeprefix("text:") for text in texts]
    columns = ["method", "keep", "always read", *names, *([ALL_TEXTS, "pooled"] if len(texts) > 1 else ["pooled"])]
    columns += ["tokens", "MiB", "of it index", "estimated"]
    lines: dict[tuple[Any, ...], list[str]] = {}
    shown = name_methods(row["method"] for row in results)
    for row in results:
        key = (row["method"], row["keep"], row["setting"])
        line = lines.setdefault(key, describe_part(row, shown))
        line.append(f"{row['ppl']:.4g}")
        if row["text"] == ALL_TEXTS or len(texts) == 1:
            line += [f"{row['ppl_pooled']:.4g}", f"{row['tokens_read']:,.0f}"]
            line += [f"{row['bytes_read'] / _MIB:.2f}", f"{row['index_bytes'] / _MIB:.2f}"]
            line.append(f"{100 * row['estimated']:.1f} %" if row.get("estimated") else "")
    note = "columns of texts: mean perplexity of documents; pooled: of all their tokens together; "
    note += "tokens: read per query, mean over heads of sparse layers; MiB: read per token, all layers; "
    note += "estimated: share of the attention that was not read (+tail), mean over heads of sparse layers"
    return [make_table(f"perplexity, {title}; {rule}\n{note}", columns, list(lines.values()), names=3)]
