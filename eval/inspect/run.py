"""Each method's selections compared with the best ones, by layer and head."""

import csv
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eval.common.by_position import buckets_of, combine_buckets, mean_by_position
from eval.common.cases import EvalCase, describe_part, describe_selection, list_cases
from eval.common.labels import name_methods
from eval.common.pictures import plot_heads, plot_positions
from eval.common.record import ALL_TEXTS, Part, Record, Row
from eval.inspect import InspectConfig
from eval.methods import base_name
from eval.methods.base import Method, rule_of
from eval.methods.oracle import Oracle
from eval.model.attend import (
    Traffic,
    causal_budgets,
    default_chunk,
    dense_traffic,
    finish_of,
    read_with_tail,
    row_bytes,
    selected_traffic,
)
from eval.model.load import EvalModel, load_eval_model, warn_of_ranges
from eval.model.scores import check_length, positions_of
from spotlight_jax import files, metrics
from spotlight_jax.attention import causal_attention, selected_attention
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import read_windows
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.models.decoder import embed_tokens
from spotlight_jax.models.runner import run_layers

QUALITY = ("iou", "recall", "mass", "oracle_mass")
MEASURES = (*QUALITY, "error")  # of each selecting head
_COLUMNS = ("IoU", "recall", "mass read", "mass of oracle-scores", "output error")  # of `MEASURES`
WORST = 10


@flax.struct.dataclass
class AttentionInputs:
    """Dense attention that gives back the queries at some positions with their outputs, and all keys and values."""

    query_positions: Int32[Array, "one n"]

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, tuple[Array, ...]]:
        """See `Attend`."""
        outputs, at = causal_attention(queries, keys, values), self.query_positions[:, :, None, None]
        some = (jnp.take_along_axis(each, at, axis=1, mode="clip") for each in (queries, outputs))
        return outputs, (*some, keys, values)


@functools.partial(jax.jit, static_argnames="chunk")
def inspect_layer(
    method: Method,
    queries: Float[Array, "one n q_heads head_dim"],
    dense: Float[Array, "one n q_heads head_dim"],
    keys: Float[Array, "one length kv_heads head_dim"],
    values: Float[Array, "one length kv_heads head_dim"],
    positions: Int32[Array, "one n"],
    budgets: Int32[Array, " length"],
    chunk: int,
) -> tuple[dict[str, Float[Array, "n heads"]], Traffic]:
    """Return `MEASURES` of a method's selections per query and selecting head, and the mean traffic of a query.

    IoU and recall are of what is selected, everything else of what is read: with a tail, the newest tokens as well.

    Args:
        dense: outputs of dense attention.
        positions: of the queries among the keys.
        chunk: queries at once; it divides their number.
    """
    index = method.index(keys, jnp.full((1,), keys.shape[1], jnp.int32))
    tail = method.tail_params(index)

    def compare(piece: tuple[Array, Array, Array]) -> tuple[dict[str, Array], Traffic]:
        rows, wanted, at = (each[None] for each in piece)
        allowed = jnp.take(budgets, at, mode="clip")
        selection = method.select(rows, keys, index, at, allowed)
        heads = selection.mask.shape[2]
        per = "kv_head" if heads == keys.shape[2] else "query_head"
        oracle = Oracle("oracle-scores", rule_of(method.selection, per=per), ()).select(rows, keys, None, at, allowed)
        probabilities = metrics.attention_probabilities(rows, keys, at, heads)
        quality = metrics.quality_of_queries(selection.mask, oracle.mask, probabilities)
        read = read_with_tail(selection, tail, at, keys)
        traffic = selected_traffic(read, keys)

        def choose(*_: Array) -> tuple[Array, Array | None, Traffic]:
            return read.mask, read.log_weights, traffic

        outputs, found = selected_attention(
            rows, keys, values, choose, positions=at, chunk=chunk, finish=finish_of(tail)
        )
        measures = {name: getattr(quality, name)[0] for name in QUALITY}
        measures["mass"] = metrics.mass_of_queries(read.mask, probabilities)[0]
        measures["error"] = metrics.output_error(outputs, wanted, heads)[0]
        return measures, traffic if tail is None else dataclasses.replace(traffic, estimated=found[1])

    pieces = tuple(each.reshape(-1, chunk, *each.shape[2:]) for each in (queries, dense, positions))
    quality, traffic = jax.lax.map(compare, pieces)
    quality = {name: values.reshape(-1, values.shape[-1]) for name, values in quality.items()}
    return quality, jax.tree.map(jnp.mean, traffic)


def inspect_window(
    model: EvalModel, tokens: Int32[np.ndarray, " length"], cases: Several[EvalCase], count: int, seed: int
) -> list[Row]:
    """Return each case's `by_head` (`[layers, heads]` of a measure), `by_position` and traffic, from one dense pass."""
    cfg, params = model.cfg, model.params
    positions = jnp.asarray(metrics.spread_positions(len(tokens), count))[None]
    most = default_chunk(cfg.q_heads, len(tokens))
    chunk = next(size for size in range(min(most, count), 0, -1) if count % size == 0)
    methods = [model.open_method(case.method, case.selection, seed) for case in cases]
    budgets = [causal_budgets(len(tokens), case.selection) for case in cases]
    found: list[list[Any]] = [[] for _ in cases]
    x = embed_tokens(params, jnp.asarray(tokens)[None], cfg)
    attend = AttentionInputs(positions)
    passed = run_layers(params, x, positions_of(x), lambda layer: attend, cfg)
    for layer, (_, (queries, outputs, keys, values)) in enumerate(passed):
        for part, method, allowed in zip(found, methods, budgets, strict=True):
            own = method.layer(layer)
            part.append(inspect_layer(own, queries, outputs, keys, values, positions, allowed, chunk))
        if not bool(jnp.isfinite(queries).all() & jnp.isfinite(keys).all()):
            raise InputError(
                f"layer {layer}'s queries or keys are not finite (NaN or Inf): the model's weights cannot be used, or "
                "their dtype is too narrow; try --dtype float32, or fetch the model again"
            )
    dense = dense_traffic(positions, cfg.kv_heads, row_bytes(cfg.head_dim, keys.dtype))
    dense_bytes = float(jnp.mean(dense.bytes))
    rows = [_summarise(jax.device_get(part), method, dense_bytes) for part, method in zip(found, methods, strict=True)]
    for row in rows:
        row["by_position"] = mean_by_position(row.pop("by_query"), np.asarray(positions)[0], len(tokens))
    return rows


def _summarise(layers: list[Any], method: Method, dense_bytes: float) -> Row:
    """Combine the layers of one case, as `inspect_layer` gives them."""
    sparse = [layer for layer in range(len(layers)) if layer not in method.dense_layers]
    traffic = [layers[layer][1] for layer in sparse]
    dense = (len(layers) - len(traffic)) * dense_bytes
    quality = {name: np.stack([found[name] for found, _ in layers]) for name in MEASURES}  # [layers, queries, heads]
    return {
        "by_head": {name: values.mean(axis=1) for name, values in quality.items()},
        "by_query": {name: values[sparse].mean(axis=(0, 2)) for name, values in quality.items()},
        "sparse_layers": sparse,
        "tokens_read": float(np.mean([layer.tokens for layer in traffic])),
        "bytes_read": dense + float(sum(layer.bytes + layer.index_bytes for layer in traffic)),
        "index_bytes": float(sum(layer.index_bytes for layer in traffic)),
        "estimated": float(np.mean([layer.estimated for layer in traffic])),
    }


def _average(rows: Several[Row]) -> Row:
    """Average windows or texts: arrays and traffic are means, and so are the figures made of them."""
    sparse = rows[0]["sparse_layers"]
    by_head = {name: np.mean([np.asarray(row["by_head"][name]) for row in rows], axis=0) for name in MEASURES}
    traffic = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("tokens_read", "bytes_read", "index_bytes", "estimated")
    }
    buckets = combine_buckets([buckets_of(row) for row in rows], MEASURES, weights=[1.0] * len(rows))
    return {
        **{name: round(float(by_head[name][sparse].mean()), 5) for name in MEASURES},
        "tokens_read": round(traffic["tokens_read"], 2),
        "bytes_read": round(traffic["bytes_read"]),
        "index_bytes": round(traffic["index_bytes"]),
        "estimated": round(traffic["estimated"], 5),
        "by_position": [bucket | {name: round(bucket[name], 5) for name in MEASURES} for bucket in buckets],
        "sparse_layers": sparse,
        "by_head": {name: np.round(values, 5).tolist() for name, values in by_head.items()},
    }


def main(cfg: InspectConfig) -> dict[str, Any]:
    """Measure every part that is not finished; write pictures and the CSV, print tables and the line of JSON."""
    use_compile_cache()
    model = load_eval_model(cfg)
    cfg = dataclasses.replace(cfg, model=model.source)
    check_length(cfg.window, model.cfg)
    warn_of_ranges(model, cfg.window)
    cases = [case for case in list_cases(cfg) if case.method != "dense"]
    with Record.open(cfg, "inspect") as record:
        data = DataConfig(
            train=cfg.texts, window=cfg.window, held_out_windows=cfg.windows_per_text, text_column=cfg.text_column
        )
        texts = read_windows(data, model.tokenizer, model.cfg.vocab, record.display.update)
        left = record.begin([_part(case, name) for name in texts for case in cases])
        for name, windows in texts.items():
            missing = [case for case in cases if _part(case, name) in left]
            if not missing:
                continue
            passes = []
            for number, window in enumerate(windows):
                record.note(f"{name}, window {number + 1} of {len(windows)}")
                passes.append(inspect_window(model, window, missing, cfg.queries, cfg.seed))
            for case, rows in zip(missing, zip(*passes, strict=True), strict=True):
                record.add(_part(case, name), _average(rows))
        overall = [_overall(record, case, list(texts)) for case in cases]
        _write_csv(record.folder.path / "heads.csv", overall)
        _draw(record.folder.path, overall)
        shown = ", ".join(text.removeprefix("text:") for text in texts)
        title = f"{model.source}, {cfg.window:,} tokens, {cfg.queries} queries a window, {shown}"
        labels = {
            "mass": "attention probability read",
            "iou": "IoU with oracle-scores",
            "error": "relative output error",
        }
        plot_positions(record.folder.path / "by_position.png", overall, labels, title)
        results = [record.row_of(_part(case, name)) or {} for name in texts for case in cases]
        results += overall if len(texts) > 1 else []
        plain = [{name: row[name] for name in row if name not in ("by_head", "sparse_layers")} for row in results]
        return record.finish(plain, [_table(title, overall), _worst_table(overall)])


def _part(case: EvalCase, text: str) -> Part:
    return case.part | {"text": text}


def _overall(record: Record, case: EvalCase, texts: Several[str]) -> Row:
    rows = [row for name in texts if (row := record.row_of(_part(case, name)))]
    if any("error" not in row for row in rows):
        raise InputError("an older version began this run and measured no output error; give another --out")
    return _part(case, ALL_TEXTS if len(texts) > 1 else texts[0]) | _average(rows)


def _write_csv(path: Path, rows: Several[Row]) -> None:
    """Write a line for each method, share, setting, layer and head."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["method", "keep", "setting", "layer", "head", "read_densely", *MEASURES])
    for row in rows:
        shape = np.shape(row["by_head"]["iou"])
        for layer, head in np.ndindex(shape):
            values = [row["by_head"][name][layer][head] for name in MEASURES]
            is_dense = int(layer not in row["sparse_layers"])
            writer.writerow([row["method"], row["keep"], row["setting"], layer, head, is_dense, *values])
    files.write_text(path, text.getvalue())


def _draw(folder: Path, rows: Several[Row]) -> None:
    """Draw `iou.png` and `mass.png`: a panel a method with its first share, KV heads and query heads apart."""
    first = {row["method"]: row for row in reversed(rows)}
    names = name_methods(row["method"] for row in rows)
    shown = [first[method] for method in names]
    labels = {"iou": "IoU with oracle-scores", "mass": "attention probability read", "error": "relative output error"}
    for measure, label in labels.items():
        panels: dict[int, list[tuple[str, np.ndarray]]] = {}
        is_drawn = [measure != "iou" or not row["method"].startswith("oracle-") for row in shown]  # the oracle's is 1
        for row in itertools.compress(shown, is_drawn) if any(is_drawn) else shown:
            values = np.full(np.shape(row["by_head"][measure]), np.nan)
            values[row["sparse_layers"]] = np.asarray(row["by_head"][measure])[row["sparse_layers"]]
            panels.setdefault(values.shape[1], []).append((names[row["method"]] + describe_selection(row), values))
        for number, (heads, drawn) in enumerate(panels.items()):
            file = f"{measure}.png" if number == 0 else f"{measure}-{heads}-heads.png"
            title = f"{rows[0]['text']}; grey: read densely"
            # an output of zeros has error 1: what is worse looks the same
            end = 1.0 if measure == "error" else math.inf
            plot_heads(folder / file, drawn, label, f"selecting head (of {heads})", title, end)


def _table(title: str, rows: Several[Row]) -> Any:
    lines, names = [], name_methods(row["method"] for row in rows)
    for row in rows:
        figures = [f"{row[name]:.3f}" for name in MEASURES]
        estimated = f"{100 * row['estimated']:.1f} %" if row["estimated"] else ""
        lines.append([*describe_part(row, names), *figures, estimated, f"{row['tokens_read']:,.0f}"])
    columns = ["method", "keep", "always read", *_COLUMNS, "estimated", "tokens"]
    note = "means over heads and sparse layers; output error: squared, relative to dense attention's output"
    return make_table(f"selections, {title}\n{note}", columns, lines, names=3)


def _worst_table(rows: Several[Row]) -> Any:
    """List the heads that lose most attention to the oracle: spotlight's, or the first method's that is no oracle."""
    order = sorted(rows, key=lambda row: (base_name(row["method"]) != "spotlight", row["method"].startswith("oracle-")))
    row = order[0]
    values = {name: np.asarray(row["by_head"][name]) for name in MEASURES}
    lost = values["oracle_mass"] - values["mass"]
    heads = sorted(
        ((layer, head) for layer in row["sparse_layers"] for head in range(lost.shape[1])), key=lambda p: -lost[p]
    )
    lines = [
        [
            f"layer {layer} head {head}",
            f"{lost[layer, head]:.3f}",
            *(f"{values[name][layer, head]:.3f}" for name in MEASURES),
        ]
        for layer, head in heads[:WORST]
    ]
    columns = ["", "mass lost", *_COLUMNS]
    method = name_methods(row["method"] for row in rows)[row["method"]]
    return make_table(f"{method}: the {len(lines)} worst heads, by mass lost against oracle-scores", columns, lines)
