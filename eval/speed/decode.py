"""A model's prefill and decoding, timed."""

import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from eval.decode import DecodeSpeedConfig
from eval.speed.kernel_times import kernel_table, trace_kernels
from spotlight_jax.cache import LANES, Cache, bucket_length
from spotlight_jax.compiled import check_device
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import check_layers
from spotlight_jax.display import open_console, print_result, print_table
from spotlight_jax.engine import Engine
from spotlight_jax.generation import head_shape
from spotlight_jax.memory import GIB, MemoryPlan, available_bytes, check_memory, plan_memory, step_reads
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.load import load_config, load_weights
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.presets import RANDOM
from spotlight_jax.models.sharding import check_mesh, config_of_device, open_mesh, shardings_of, weights_on
from spotlight_jax.models.source import DEFAULT_MODEL
from spotlight_jax.selector.checkpoint import Selector, choose_model, load_selector
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.tail import init_tail

Row = dict[str, Any]  # what was measured of one way to decode
Loaded = tuple[DecoderConfig, Params, Selector]


def name_model(cfg: DecodeSpeedConfig) -> DecodeSpeedConfig:
    """Return the config with the model's name filled in: a preset's is random:PRESET."""
    preset = cfg.preset if cfg.preset or cfg.model or cfg.selector else DEFAULT_MODEL
    selectors = {} if cfg.selector is None else {str(cfg.selector): load_selector(cfg.selector)}
    model, remarks = choose_model(RANDOM + preset if preset else cfg.model, selectors)
    if not preset:  # random weights belong to no selector
        for remark in remarks:
            print(remark, file=sys.stderr, flush=True)
    return dataclasses.replace(cfg, preset=None, model=model)


def load(cfg: DecodeSpeedConfig, dtype: jnp.dtype) -> Loaded:
    """Load or draw weights and hash functions."""
    assert cfg.model is not None
    mesh = open_mesh(parse_mesh(cfg.mesh), load_config(cfg.model))
    model_cfg, params = load_weights(cfg.model, dtype, weights_on(mesh))
    shape = head_shape(model_cfg)
    if cfg.selector is not None:
        return model_cfg, params, load_selector(cfg.selector, shape)
    hash_cfg = TransformConfig(code_bits=cfg.code_bits)
    return model_cfg, params, Selector(shape, init_functions(jax.random.key(1), hash_cfg, shape), "", {})


@partial(jax.jit, static_argnames=("shape", "dtype", "place"))
def _draw(key: Array, shape: tuple[int, ...], dtype: jnp.dtype, place: jax.sharding.Sharding | None) -> Array:
    """Random numbers of a leaf, each device its own part; leaves of the same shape share a program."""
    drawn = jax.random.bits(key, shape) if dtype == jnp.uint32 else jax.random.normal(key, shape, dtype)
    return drawn if place is None else jax.lax.with_sharding_constraint(drawn, place)


def random_cache(engine: Engine, lengths: Sequence[int], max_len: int) -> Cache:
    """Draw a cache of random numbers with these lengths, leaf by leaf, each device its own part."""
    batch = len(lengths)
    short = engine.empty_cache(batch, LANES).layers
    shapes = jax.eval_shape(lambda: jax.tree.leaves(engine.empty_layers(batch, max_len)))
    places = [None] * len(shapes) if engine.mesh is None else shardings_of(short, engine.mesh)

    drawn = [
        _draw(jax.random.key(number), leaf.shape, leaf.dtype, place)
        for number, (leaf, place) in enumerate(zip(shapes, places, strict=True))
    ]
    layers = jax.tree.unflatten(jax.tree.structure(short), drawn)
    return Cache(layers=layers, lengths=jnp.asarray(lengths, jnp.int32), code_sets=jnp.zeros((batch,), jnp.int32))


def decoded(new_tokens: int, rounds: int, profile: bool = False) -> int:
    """Return how many tokens each sequence gets after its prompt: a round more than is timed compiles and warms up."""
    return new_tokens * (rounds + 1 + profile) + 2


class Decoding:
    """A batch of prompts on the way: prefilled, then decoded round by round."""

    def __init__(self, cfg: DecodeSpeedConfig, engine: Engine):
        """Prefill, or draw the cache; `prefill_seconds` are without compiling."""
        self.engine, self.steps = engine, cfg.new_tokens
        total = decoded(cfg.new_tokens, cfg.rounds, cfg.profile)
        rng, vocab = np.random.default_rng(0), engine.model_cfg.vocab
        start, compiled = time.perf_counter(), engine.compile_seconds
        if cfg.skip_prefill:
            state = engine.prefill([[1]] * len(cfg.lengths), total)
            capacity = engine.capacity(0, max(cfg.lengths), total)
            state = dataclasses.replace(state, cache=random_cache(engine, cfg.lengths, capacity))
        else:
            state = engine.prefill([rng.integers(0, vocab, length).tolist() for length in cfg.lengths], total)
        self.state = jax.block_until_ready(state)
        self.prefill_seconds = time.perf_counter() - start - (engine.compile_seconds - compiled)

    def take_round(self) -> float:
        """Time a step, compiling apart; returns seconds."""
        start, compiled, steps = time.perf_counter(), self.engine.compile_seconds, 0
        while steps < self.steps:
            self.state, tokens = self.engine.decode(self.state, self.steps - steps)
            steps += tokens.shape[1]
        return (time.perf_counter() - start - (self.engine.compile_seconds - compiled)) / steps


def _spread(times: list[float]) -> str:
    """Return the median and range in milliseconds."""
    return f"{statistics.median(times) * 1e3:.3f} ({min(times) * 1e3:.3f} to {max(times) * 1e3:.3f})"


def measure(cfg: DecodeSpeedConfig, model_cfg: DecoderConfig, params: Params, selector: Selector) -> dict[str, Row]:
    """Time `cfg.methods` for one batch of prompts, in turn; with what each step reads."""
    decode = DecodeConfig(
        selection=cfg.selection, prefill_chunk=cfg.prefill_chunk, attention=cfg.attention, block=cfg.new_tokens
    )
    tailed = selector
    if selector.params.tail is None:  # corrections that change nothing: as much work as trained ones
        start = init_tail(model_cfg.layers, model_cfg.q_heads)
        tailed = dataclasses.replace(selector, params=dataclasses.replace(selector.params, tail=start))
    runs = {}
    for name in cfg.methods:
        has_tail = name == "sparse+tail"
        own = None if name == "dense" else tailed if has_tail else selector
        engine = Engine(model_cfg, params, own, dataclasses.replace(decode, tail=has_tail))
        runs[name] = Decoding(cfg, engine)
    rounds = [{name: run.take_round() for name, run in runs.items()} for _ in range(cfg.rounds + 1)]
    results: dict[str, Row] = {}
    for name, run in runs.items():
        engine, steps = run.engine, [seconds[name] for seconds in rounds[1:]]  # the first one compiles and warms up
        results[name] = {
            "prefill_seconds": run.prefill_seconds,
            "prefill_tokens_per_second": sum(cfg.lengths) / run.prefill_seconds,
            "step_seconds": steps,
            "decode_tokens_per_second": len(cfg.lengths) / statistics.median(steps),
            "compile_seconds": engine.compile_seconds,
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
        read_by = None if name == "dense" else selector.cfg
        reads = step_reads(model_cfg, engine.dtype, list(cfg.lengths), read_by, cfg.selection, 0, name == "sparse+tail")
        results[name]["reads"] = dataclasses.asdict(reads)
        if cfg.profile:
            results[name]["kernels"] = trace_kernels(run.take_round, cfg.new_tokens)
    return results


def plan(cfg: DecodeSpeedConfig, model_cfg: DecoderConfig, code_bits: int) -> MemoryPlan:
    """Return the memory of a device that `measure` needs: both methods' caches where both are timed."""
    sizes = parse_mesh(cfg.mesh)
    batch, capacity = (
        -(-len(cfg.lengths) // sizes.get("data", 1)),
        max(cfg.lengths) + decoded(cfg.new_tokens, cfg.rounds, cfg.profile),
    )
    hash_cfg = None if cfg.methods == ("dense",) else TransformConfig(code_bits=code_bits)
    chunk = 1 if cfg.skip_prefill else cfg.prefill_chunk or 2048
    own, dtype = config_of_device(model_cfg, sizes), resolve_dtype(cfg.dtype)
    slots = bucket_length(capacity) // sizes.get("context", 1)
    args = own, dtype, batch, slots, chunk, hash_cfg, cfg.selection
    needed = plan_memory(*args, has_tail="sparse+tail" in cfg.methods)
    return dataclasses.replace(needed, cache=needed.cache * len(cfg.methods))


def main(cfg: DecodeSpeedConfig) -> Row:
    """Time it, print the table and one line of JSON; returns what the line holds."""
    check_device()
    console = Console(highlight=False)
    cfg = name_model(cfg)
    assert cfg.model is not None
    model_cfg = load_config(cfg.model)
    check_layers(cfg.dense_layers, model_cfg.layers)
    check_mesh(parse_mesh(cfg.mesh), model_cfg, len(jax.devices()))
    if cfg.model.startswith(RANDOM):
        needed = plan(cfg, model_cfg, cfg.code_bits)
        console.print(f"memory: {needed.describe()}")
        check_memory(needed, available_bytes())
    results = measure(cfg, *load(cfg, resolve_dtype(cfg.dtype)))
    show(cfg, results)
    summary = {
        "eval": "decode",
        "config": {**dataclasses.asdict(cfg), "selector": str(cfg.selector), "dtype": resolve_dtype(cfg.dtype).name},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "results": results,
    }
    if "dense" in results and len(results) > 1:
        steps = {name: statistics.median(result["step_seconds"]) for name, result in results.items()}
        summary["step_ratio"] = steps["dense"] / steps.get("sparse", steps[cfg.methods[-1]])
    print_result(summary)
    return summary


def show(cfg: DecodeSpeedConfig, results: dict[str, Row]) -> None:
    """Print the table, and with --profile one of the kernels of each way to read."""
    console = open_console()
    print_table(console, _table(cfg, results))
    if cfg.profile:
        for name, result in results.items():
            print_table(console, kernel_table(f"{name}: a step by kernel", result["kernels"]))


def _table(cfg: DecodeSpeedConfig, results: dict[str, Row]) -> Table:
    """Return a table of dense and sparse decoding."""
    table = Table(title=f"{cfg.model}, prompts of {', '.join(map(str, cfg.lengths))} tokens")
    table.add_column("")
    rows: list[list[str]] = [
        ["prefill, tokens/s"], ["decode, tokens/s"], ["step, ms (range)"],
        ["tokens read per head"], ["peak memory, GiB"], ["compile, s"],
    ]  # fmt: skip
    for name, result in results.items():
        table.add_column(name, justify="right")
        peak = result["peak_bytes"]
        for row, cell in zip(
            rows,
            (
                "-" if cfg.skip_prefill else f"{result['prefill_tokens_per_second']:,.1f}",
                f"{result['decode_tokens_per_second']:,.2f}",
                _spread(result["step_seconds"]),
                f"{result['reads']['tokens']:,}",
                "-" if peak is None else f"{peak / GIB:.2f}",
                f"{result['compile_seconds']:.1f}",
            ),
            strict=True,
        ):
            row.append(cell)
    for row in rows:
        table.add_row(*row)
    return table
