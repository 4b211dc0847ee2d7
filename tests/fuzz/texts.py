"""Targets of text: JSON lines, JSON, CSV and parquet as training text, token ids, LongBench's questions and answers."""

import functools
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from eval.longbench.data import read_samples
from eval.longbench.score import score_folder
from eval.report.plan import read_plan
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import open_windows
from tests.byte_tokenizer import byte_tokenizer
from tests.fuzz.damage import Rng, damage_bytes, damage_json, json_bytes, strange_value
from tests.fuzz.target import Target

_ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": "One document,\nof two lines."},
    {"id": 2, "text": None},
    {"id": 3, "text": "Noch ein \u201eText\u201c\u2028 \U0001f642."},
]
_QUESTIONS: list[dict[str, Any]] = [
    {
        "context": "Passage 1:\nAnn is here.",
        "input": "Who?",
        "answers": ["Ann"],
        "all_classes": ["Ann", "Bob"],
        "length": 4,
        "pred": "Ann",
    },
    {"context": "Bob.", "input": "Who?", "answers": ["Bob", "B"], "all_classes": None, "length": 1, "pred": "Bob"},
]


def _lines(rng: Rng, rows: list[dict[str, Any]]) -> bytes:
    """JSON lines of which some are damaged."""
    lines = [json_bytes(rng, row) if rng.random() < 0.4 else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    return damage_bytes(rng, data) if rng.random() < 0.2 else data


def _write_lines(rng: Rng, folder: Path) -> Path:
    path = folder / str(rng.choice(["x.jsonl", "x.JSONL", "x.ndjson", "x.jsonl.gz"]))
    data = _lines(rng, _ROWS)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
        data = damage_bytes(rng, data) if rng.random() < 0.5 else data
    path.write_bytes(data)
    return path


def _write_json(rng: Rng, folder: Path) -> Path:
    (folder / "x.json").write_bytes(json_bytes(rng, _ROWS))
    return folder / "x.json"


def _write_csv(rng: Rng, folder: Path) -> Path:
    data = b'id,text\n1,"One ""document"",\nof two lines."\n2,\n3,Noch ein\n'
    for _ in range(int(rng.integers(0, 3))):
        at = int(rng.integers(0, len(data)))
        data = data[:at] + bytes(rng.choice(list(b'",\n\r\0\xff\t;'), size=2).tolist()) + data[at:]
    (folder / "x.csv").write_bytes(damage_bytes(rng, data) if rng.random() < 0.5 else data)
    return folder / "x.csv"


@functools.cache
def _sound_parquet(kind: str) -> bytes:
    rows = _ROWS if kind == "text" else _QUESTIONS
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows * 20), sink, compression="none" if kind == "text" else "zstd")
    return sink.getvalue()


def _parquet(rng: Rng, kind: str) -> bytes:
    """A damaged file, or a sound one with columns of other types."""
    if rng.random() < 0.6:
        data = _sound_parquet(kind)
        return damage_bytes(rng, data if rng.random() < 0.5 else data[:100]) if rng.random() < 0.3 else _tail(rng, data)
    rows = damage_json(rng, _ROWS if kind == "text" else _QUESTIONS)
    sink = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), sink)
    except Exception:  # no table can hold these
        return rng.bytes(200)
    return sink.getvalue()


def _tail(rng: Rng, data: bytes) -> bytes:
    """The bytes with damage to the end, which holds the schema and where the pages lie."""
    return data[:-600] + damage_bytes(rng, data[-600:])


def _write_parquet(rng: Rng, folder: Path) -> Path:
    (folder / "x.parquet").write_bytes(_parquet(rng, "text"))
    return folder / "x.parquet"


def _write_ids(rng: Rng, folder: Path) -> Path:
    kinds = ("<u2", "<i4", "<i8", "<u8", "<f4", "?", ">i4", "<M8[s]", "<U3", "<c8")
    ids = rng.integers(0, 200, size=int(rng.integers(0, 90))).astype(str(rng.choice(kinds)))
    if rng.random() < 0.2:
        ids = ids[: len(ids) // 2 * 2].reshape(2, -1)
    sink = io.BytesIO()
    np.save(sink, ids)
    data = sink.getvalue()
    if rng.random() < 0.3:  # the header is a Python expression
        value = repr(strange_value(rng)).encode("ascii", "replace")[:60]
        data = data[:10] + data[10:].replace(f"({len(ids)},)".encode(), value, 1)
    (folder / "x.npy").write_bytes(damage_bytes(rng, data) if rng.random() < 0.6 else data)
    return folder / "x.npy"


def _train(path: Path) -> None:
    """What training reads of a file."""
    os.environ["SPOTLIGHT_CACHE"] = str(path.parent / "cache")
    windows = open_windows(DataConfig((str(path),), window=4, held_out_windows=1), byte_tokenizer(), 257)
    assert windows.held_out.shape == (1, 4) and windows.held_out.min() >= 0 and windows.held_out.max() < 257
    windows.next()


def _write_questions(rng: Rng, folder: Path) -> Path:
    if rng.random() < 0.5:
        (folder / "trec.jsonl").write_bytes(_lines(rng, _QUESTIONS))
    else:
        (folder / "trec.parquet").write_bytes(_parquet(rng, "questions"))
    return folder


def _read_questions(folder: Path) -> None:
    for sample in read_samples(str(folder), "trec"):
        sample.context.encode(), sample.question.encode()
        assert all(answer.encode() is not None for answer in (*sample.answers, *(sample.classes or ())))


def _write_predictions(rng: Rng, folder: Path) -> Path:
    (folder / f"{rng.choice(['trec', 'hotpotqa', 'dureader', 'passage_count'])}.jsonl").write_bytes(
        _lines(rng, _QUESTIONS)
    )
    return folder


_PLAN: dict[str, Any] = {
    "title": "A plan",
    "model": "random:tiny",
    "evaluations": {
        "reading": {"eval": "perplexity", "methods": ["dense", "window"], "keep": [0.1], "copy_test": True},
        "near": {"eval": "inspect", "methods": ["window"], "selection": {"sink_tokens": 4}, "windows_per_text": 2},
    },
}


def _write_plan(rng: Rng, folder: Path) -> Path:
    """JSON is YAML; half of the plans are in YAML's own form."""
    path, plan = folder / "plan.yaml", json_bytes(rng, _PLAN)
    if rng.random() < 0.5:
        plan = damage_bytes(rng, yaml.safe_dump(_PLAN).encode())
    path.write_bytes(plan)
    return path


TARGETS = {
    "plan": Target(_write_plan, lambda path: read_plan(path, {}, 0.5)),
    "jsonl": Target(_write_lines, _train),
    "json": Target(_write_json, _train),
    "csv": Target(_write_csv, _train),
    "parquet": Target(_write_parquet, _train),
    "npy": Target(_write_ids, _train),
    "longbench": Target(_write_questions, _read_questions),
    "predictions": Target(_write_predictions, lambda folder: score_folder(folder, by_length=True)),
}
