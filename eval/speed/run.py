"""A layer's operations and whole models, timed by length and batch."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from eval.common.record import Part, Record, Row
from eval.decode import DecodeSpeedConfig
from eval.speed import FLAGS_OF, SpeedConfig, decode, plots
from eval.speed.cases import bytes_of_case, case_names, time_case
from eval.speed.checks import check_ops
from eval.speed.kernel_times import kernel_table
from eval.speed.ops import (
    count_copies,
    draw_held,
    draw_inputs,
    empty_op,
    make_ops,
    read_bytes,
    runnable_dense,
    shape_of,
)
from eval.speed.timing import Op, copy_bandwidth, time_ops
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import check_layers
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.table import OPS
from spotlight_jax.memory import available_bytes
from spotlight_jax.models.config import DecoderConfig, nearest
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.sharding import check_mesh

# what fits, by platform: preset, lengths of operations, lengths and batches of whole models
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "preset": "smollm2-135m",
        "lengths": (4096, 8192, 16384, 32768),
        "model_lengths": (2048, 4096, 7500),
        "model_batches": (1,),
    },
    "gpu": {
        "preset": "qwen2.5-7b",
        "lengths": (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576),
        "model_lengths": (8192, 32768, 131072),
        "model_batches": (1, 4, 6, 24),
    },
}


def resolve(cfg: SpeedConfig) -> SpeedConfig:
    """Return the config with this device's defaults in place of what was not given."""
    defaults = DEFAULTS.get(jax.default_backend(), DEFAULTS["gpu"])
    elsewhere = {name for part, names in FLAGS_OF.items() if part not in cfg.parts for name in names}
    given = {name: getattr(cfg, name) or value for name, value in defaults.items() if name not in elsewhere}
    check_layers(cfg.dense_layers, PRESETS[str(given["preset"])].layers)
    check_mesh(parse_mesh(cfg.mesh), PRESETS[str(given["preset"])], len(jax.devices()))
    given["dtype"] = resolve_dtype(cfg.dtype).name
    return dataclasses.replace(cfg, **given)


_MORE_MEMORY = " (JAX takes 75 % of a GPU; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets it take more)"


def _spread(seconds: Sequence[float]) -> Row:
    return {"seconds": statistics.median(seconds), "least": min(seconds), "greatest": max(seconds)}


def pick_ops(ops: dict[str, Op], names: Sequence[str]) -> dict[str, Op]:
    """Return the named operations, or all; raises InputError for a name that none has."""
    for name in names:
        if name not in ops:
            raise InputError(f"there is no operation '{name}'{nearest(name, tuple(ops))}")
    return {name: op for name, op in ops.items() if not names or name in names}


def time_length(cfg: SpeedConfig, batch: int, length: int, bandwidth: float, record: Record) -> list[Row]:
    """Time all operations at one length and batch; no rows where a single cache does not fit."""
    shape = shape_of(PRESETS[cfg.preset or ""], batch, length, cfg.dtype, cfg.code_bits, cfg.keep)
    copies = count_copies(shape, jax.default_backend(), available_bytes(), cfg.caches)
    if copies == 0:
        record.say(f"speed: {batch} x {length} tokens do not fit and are left out")
        return []
    inputs, ops = draw_inputs(shape), pick_ops(make_ops(shape, runnable_dense(shape)), cfg.ops)
    errors = check_ops(shape, ops, inputs, draw_held(shape, inputs, 1)[0])
    note = functools.partial(_note, record, batch, length)
    times = time_ops(ops, empty_op, draw_held(shape, inputs, copies), inputs, cfg.rounds, note)
    rows = []
    for name, seconds in times.items():
        moved = read_bytes(shape, name, inputs)
        tokens = length if name.startswith(("dense", "score,")) or name == "score" else shape.budget
        rows.append(
            {"task": "op", "op": name, "method": _method(name), "keep": 1.0 if name.startswith("dense") else cfg.keep}
            | {"batch": batch, "length": length, **_spread(seconds), "tokens_read": tokens, "bytes_read": moved}
            | {"floor_seconds": moved / bandwidth, "error": errors[name], "caches": copies}
        )
    return rows


def _note(record: Record, batch: int, length: int, op: str) -> None:
    record.note(f"{batch} x {length}: {op or 'the empty loop'}")


def _method(op: str) -> str:
    """Return the method that an operation is part of."""
    if op.startswith("dense layer"):
        return op.replace(" layer", "")
    return "paper" if op.endswith("Hamming") else "lax.top_k" if op.endswith("top_k") else "spotlight"


def time_decoding(
    cfg: SpeedConfig, batch: int, length: int, loaded: decode.Loaded, bandwidth: float, record: Record
) -> list[Row]:
    """Time dense and sparse decoding, in turn where both caches fit, else apart; no rows where neither fits."""
    prompt = max(length - decode.decoded(cfg.new_tokens, cfg.rounds, cfg.profile), 1)
    point = DecodeSpeedConfig(
        preset=cfg.preset or "", lengths=(prompt,) * batch, new_tokens=cfg.new_tokens, rounds=cfg.rounds,
        keep=cfg.keep, code_bits=cfg.code_bits, dense_layers=cfg.dense_layers, dtype=cfg.dtype, skip_prefill=True,
        profile=cfg.profile, methods=("dense", "sparse", "sparse+tail") if cfg.tail else ("dense", "sparse"),
        mesh=cfg.mesh,
    )  # fmt: skip
    model_cfg, params, _ = loaded
    weights = _bytes_of_weights(model_cfg, params)

    def fits(point: DecodeSpeedConfig) -> bool:
        needed, free = decode.plan(point, model_cfg, cfg.code_bits), available_bytes()
        return free is None or needed.total - needed.weights < free  # the weights are there already

    if fits(point):
        results, how = decode.measure(point, *loaded), "in turn"
    else:
        apart = [dataclasses.replace(point, methods=(name,)) for name in point.methods]
        if not all(map(fits, apart)):
            record.say(f"speed: {batch} x {length} tokens do not fit with the weights and are left out{_MORE_MEMORY}")
            return []
        results, how = {}, "apart"
        for alone in apart:
            results |= decode.measure(alone, *loaded)
    rows = []
    for name, result in results.items():
        reads = result["reads"]
        parts = math.prod(parse_mesh(cfg.mesh).values())  # of the cache, each on its device
        moved = weights + (reads["bytes_keys_values"] + reads["bytes_codes"]) // parts
        rows.append(
            {"task": "decode", "method": name.replace("sparse", "spotlight")}
            | {"keep": 1.0 if name == "dense" else cfg.keep, "batch": batch, "length": length}
            | _spread(result["step_seconds"])
            | {"tokens_per_second": result["decode_tokens_per_second"], "timed": how}
            | {"tokens_read": reads["tokens"], "bytes_read": moved, "floor_seconds": moved / bandwidth}
            | ({"kernels": result["kernels"]} if cfg.profile else {})
        )
    return rows


def _bytes_of_weights(cfg: DecoderConfig, params: Params) -> int:
    """Return the bytes of weights that a step reads on one device: all but an embedding table that is no head."""
    skipped = () if cfg.tied else ("embed",)
    read = {name: part for name, part in params.items() if name not in skipped}
    parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(read)]
    return sum(math.prod(part) * leaf.dtype.itemsize for part, leaf in zip(parts, jax.tree.leaves(read), strict=True))


def time_kernels(cfg: SpeedConfig, op: str, case: str, record: Record) -> list[Row]:
    """Time one op's case by implementation; no rows where its arrays do not fit."""
    free = available_bytes()
    if free is not None and 4 * bytes_of_case(op, case) > free:
        record.say(f"speed: {op}, {case} does not fit and is left out")
        return []
    times = time_case(op, case, cfg.rounds, lambda impl: record.note(f"{op}, {case}: {impl or 'the empty loop'}"))
    return [{"task": "kernel", "op": op, "case": case, "method": impl} | _spread(times[impl]) for impl in times]


def time_parts(cfg: SpeedConfig, record: Record) -> list[Row]:
    """Time all parts; those that are finished are read from the record."""
    points = {"ops": (cfg.lengths, cfg.batches), "model": (cfg.model_lengths, cfg.model_batches)}
    parts: list[Part] = [
        {"part": kind, "batch": batch, "length": length}
        for kind in cfg.parts
        if kind in points
        for length in points[kind][0]
        for batch in points[kind][1]
    ]
    if "kernels" in cfg.parts:
        parts += [{"part": "kernels", "op": op, "case": case} for op in OPS for case in case_names(op)]
    left = record.begin(parts)
    bandwidth = copy_bandwidth() if left else 0.0
    loaded = None
    for part in left:
        batch, length = part.get("batch", 0), part.get("length", 0)
        if part["part"] == "kernels":
            rows = time_kernels(cfg, part["op"], part["case"], record)
        elif part["part"] == "ops":
            rows = time_length(cfg, batch, length, bandwidth, record)
        else:
            if loaded is None:
                point = DecodeSpeedConfig(preset=cfg.preset or "", code_bits=cfg.code_bits, mesh=cfg.mesh)
                loaded = decode.load(decode.name_model(point), jnp.dtype(cfg.dtype))
            rows = time_decoding(cfg, batch, length, loaded, bandwidth, record)
        record.add(part, {"copy_bandwidth": bandwidth, "rows": rows})
        for line in _progress_lines(rows):
            record.say(line)
    done = [record.row_of(part) for part in parts]
    return [row for finished in done if finished is not None for row in finished["rows"]]


def _progress_lines(rows: Sequence[Row]) -> list[str]:
    """Return what a part prints once it is finished: sparse against the fastest dense one."""
    some = [row for row in rows if row["method"] == "spotlight" and row.get("op", "sparse layer") == "sparse layer"]
    return [
        f"{row['batch']} x {row['length']:,}: {row.get('op', 'decoding')} {1e3 * row['seconds']:,.4g} ms, "
        f"{ratio} as fast as dense"
        for row in some
        if (ratio := _ratio(rows, row))
    ]


def _ratio(rows: Sequence[Row], row: Row) -> str:
    """Return how much faster a row is than the fastest dense one; nothing where none was timed, or all is noise."""
    if row["seconds"] <= 0 or not any(other["method"].startswith("dense") for other in rows):
        return ""  # 0: no longer than the empty loop, on a noisy machine
    return f"{fastest_dense(rows, row)['seconds'] / row['seconds']:.2f} x"


def main(cfg: SpeedConfig) -> dict[str, Any]:
    """Time it; returns what the last line of stdout holds."""
    use_compile_cache()
    cfg = resolve(cfg)
    with Record.open(cfg, "speed") as record:
        rows = time_parts(cfg, record)
        device, folder = jax.devices()[0].device_kind, record.folder.path
        tables = []
        for task, make in (("op", _ops_tables), ("decode", _decode_tables), ("kernel", _kernel_tables)):
            if found := [row for row in rows if row["task"] == task]:
                tables += make(cfg, found)
                if task in plots.PLOTS:
                    plots.PLOTS[task](folder / f"{task}.png", found, f"{cfg.preset}, {cfg.dtype}, {device}")
        return record.finish(rows, tables)


def fastest_dense(rows: Sequence[Row], row: Row) -> Row:
    """Return the dense row that another is compared with: same batch and length, least time."""
    same = [
        other
        for other in rows
        if other["method"].startswith("dense") and (other["batch"], other["length"]) == (row["batch"], row["length"])
    ]
    return min(same, key=lambda other: other["seconds"])


def _ops_tables(cfg: SpeedConfig, rows: Sequence[Row]) -> list[Table]:
    """Return one table for each batch and length."""
    tables = []
    for batch, length in dict.fromkeys((row["batch"], row["length"]) for row in rows):
        some = [row for row in rows if (row["batch"], row["length"]) == (batch, length)]
        lines = []
        for row in some:
            times = [f"{row[name] * 1e6:,.1f}" for name in ("seconds", "least", "greatest", "floor_seconds")]
            ratio = _ratio(some, row) if "layer" in row["op"] else ""
            lines.append([row["op"], times[0], f"{times[1]} to {times[2]}", times[3], ratio])
        title = f"{cfg.preset}, {cfg.dtype}, {batch} x {length:,} tokens, keep {cfg.keep:g}: one layer"
        tables.append(make_table(title, ["operation", "µs", "range", "floor", "speed"], lines))
    return tables


def _kernel_tables(cfg: SpeedConfig, rows: Sequence[Row]) -> list[Table]:
    """Return one table for each op."""
    tables = []
    for op in dict.fromkeys(row["op"] for row in rows):
        some = [row for row in rows if row["op"] == op]
        lines = []
        for row in some:
            seconds, least, greatest = (f"{row[name] * 1e6:,.1f}" for name in ("seconds", "least", "greatest"))
            lines.append([row["case"], row["method"], seconds, f"{least} to {greatest}"])
        tables.append(make_table(f"{op}: by implementation", ["case", "implementation", "µs", "range"], lines, names=2))
    return tables


def _decode_tables(cfg: SpeedConfig, rows: Sequence[Row]) -> list[Table]:
    """Return tokens per second of whole models, and a step's kernels where they were traced."""
    lines = []
    for row in rows:
        times = [f"{1e3 * row[name]:,.2f}" for name in ("seconds", "floor_seconds")]
        place = [f"{row['batch']} x {row['length']:,}", row["method"]]
        lines.append([*place, f"{row['tokens_per_second']:,.1f}", *times, _ratio(rows, row)])
    title = f"{cfg.preset}, {cfg.dtype}, keep {cfg.keep:g}: decoding"
    tables = [make_table(title, ["tokens", "method", "tokens/s", "step, ms", "floor", "speed"], lines, names=2)]
    for row in rows:
        if "kernels" in row:
            title = f"{row['batch']} x {row['length']:,}, {row['method']}: a step by kernel"
            tables.append(kernel_table(title, row["kernels"]))
    return tables
