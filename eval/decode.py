"""Prefill and decode at a model's shape, dense beside sparse: tokens per second and peak memory.

    python -m eval.decode --preset smollm2-135m --lengths 7500                # two CPU cores: about three minutes
    python -m eval.decode --preset qwen2.5-7b --lengths 131072               # one 80 GB GPU
    python -m eval.decode --preset qwen2.5-7b --lengths 32768 24576 32000 16384

Weights and hash functions are random (times do not depend on them); `--model` and `--selector` take real ones. Each
length is one sequence of the batch. Dense and sparse steps are timed in turn, so that whatever else the machine does
falls on both. `--layer` times attention alone,
per layer: append, then read densely, or score, select and read.
"""

import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from spotlight_jax import cli, hashing
from spotlight_jax.cached_attention import AttentionImpl, attend_densely, attend_sparsely
from spotlight_jax.checkpoint import Selector, load_selector
from spotlight_jax.engine import DecodeConfig, Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generate import head_shape
from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.kernels.sparse_attention import sparse_attention
from spotlight_jax.memory import GIB, available_bytes, check_memory, plan_memory, step_reads
from spotlight_jax.models.config import DecoderConfig, nearest
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.load import load_model
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.scoring import hash_score_range
from spotlight_jax.selection import SelectionConfig, select_tokens


@dataclasses.dataclass(frozen=True)
class DecodeSpeedConfig:
    """What is timed."""

    preset: str = "smollm2-135m"
    """Shape of the model, with random weights."""
    model: str | None = None
    """A real model instead."""
    selector: Path | None = None
    """A trained selector instead of random hash functions."""
    lengths: tuple[int, ...] = (7500,)
    """Prompt tokens of each sequence of the batch."""
    new_tokens: int = 64
    """Steps timed per round."""
    rounds: int = 7
    """Rounds, dense and sparse in turn; medians are reported."""
    keep: float = 0.02
    """Share of the tokens that a query reads."""
    code_bits: int = 128
    """Of the random hash functions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and cache; auto: bfloat16 on an accelerator, float32 on a CPU."""
    prefill_chunk: int | None = None
    """Prompt tokens per prefill step."""
    attention: AttentionImpl = "auto"
    """Implementation of dense attention."""
    skip_prefill: bool = False
    """Fill the cache with random numbers instead: the same decoding times, sooner."""
    methods: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
    """What to time; one alone gives its own peak memory."""
    layer: bool = True
    """Time attention alone too."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        if self.preset not in PRESETS:
            raise InputError(f"there is no preset {self.preset!r}{nearest(self.preset, tuple(PRESETS))}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError("give --methods dense, sparse or both, each once")
        if not self.lengths or min(self.lengths) < 1 or self.new_tokens < 1 or self.rounds < 1:
            raise InputError("lengths, new_tokens and rounds must be at least 1")


def load(cfg: DecodeSpeedConfig, dtype: jnp.dtype) -> tuple[DecoderConfig, dict, Selector]:
    """Weights and hash functions, real or random."""
    if cfg.model is None:
        model_cfg = PRESETS[cfg.preset]
        params = init_params(jax.random.key(0), model_cfg, dtype)
    else:
        model = load_model(cfg.model, dtype)
        model_cfg, params = model.cfg, model.params
    shape = head_shape(model_cfg)
    if cfg.selector is not None:
        return model_cfg, params, load_selector(cfg.selector, shape)
    hash_cfg = hashing.HashConfig(code_bits=cfg.code_bits)
    return model_cfg, params, Selector(hash_cfg, shape, hashing.init_params(jax.random.key(1), hash_cfg, shape), "", {})


def _fill(tree, lengths: Sequence[int]):
    """A cache of random numbers with these lengths."""

    def draw(place: int, leaf):
        key = jax.random.key(place)
        bits = leaf.dtype == jnp.uint32
        return jax.random.bits(key, leaf.shape) if bits else jax.random.normal(key, leaf.shape, leaf.dtype)

    layers, structure = jax.tree.flatten(tree.layers)
    layers = [draw(place, leaf) for place, leaf in enumerate(layers)]
    return tree.replace(layers=jax.tree.unflatten(structure, layers), lengths=jnp.asarray(lengths, jnp.int32))


def time_model(cfg: DecodeSpeedConfig, engine: Engine, lengths: Sequence[int]) -> Iterator[float]:
    """Prefill, then an endless decode: yields prefill seconds first, then seconds per step of each round."""
    vocab = engine.model_cfg.vocab
    total = cfg.new_tokens * (cfg.rounds + 1) + 2
    rng = np.random.default_rng(0)
    compiled, start = engine.compile_seconds, time.perf_counter()
    if cfg.skip_prefill:
        state = engine.prefill([[1]] * len(lengths), total)
        room = engine.capacity(0, max(lengths), total)
        state = dataclasses.replace(state, cache=_fill(engine.empty_cache(len(lengths), room), lengths))
    else:
        state = engine.prefill([rng.integers(0, vocab, length).tolist() for length in lengths], total)
    jax.block_until_ready(state)
    yield time.perf_counter() - start - (engine.compile_seconds - compiled)
    for _ in range(cfg.rounds + 1):  # the first one compiles and warms up
        compiled, start, steps = engine.compile_seconds, time.perf_counter(), 0
        while steps < cfg.new_tokens:
            state, tokens = engine.decode(state, cfg.new_tokens - steps)
            steps += tokens.shape[1]
        yield (time.perf_counter() - start - (engine.compile_seconds - compiled)) / steps


def time_attention(cfg: DecodeSpeedConfig, engine: Engine, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Seconds per layer of attention alone.

    `dense`: append and read; `sparse`: hash, append, score, select and read; `reading`: score, select and read, which
    is what `sparse` does with the cache. One compiled loop walks over every layer that can be sparse, each with its
    own cache as in the model (a single layer's would stay in a CPU's caches); the kinds are timed in turn.
    """
    model_cfg, batch, steps = engine.model_cfg, len(lengths), cfg.new_tokens
    cache = _fill(engine.empty_cache(batch, engine.capacity(0, max(lengths), steps)), lengths)
    pairs = [pair for pair in zip(cache.layers, engine.selectors, strict=True) if pair[1] is not None]
    layers, selectors = zip(*pairs, strict=True)
    del cache, pairs
    heads = (model_cfg.q_heads, model_cfg.kv_heads, model_cfg.kv_heads)
    new = [
        jax.random.normal(jax.random.key(place), (batch, 1, count, model_cfg.head_dim), engine.dtype)
        for place, count in enumerate(heads)
    ]
    selection = dataclasses.replace(engine.cfg.selection, min_context=0)

    weights = jax.random.randint(jax.random.key(9), (batch, 1, model_cfg.kv_heads, cfg.code_bits), -127, 128)
    score_range = hash_score_range(selectors[0].cfg, model_cfg.group, per_kv_head=True)

    def read(queries, layer, lengths):
        turned = weights + queries[:, :, :1, :1].astype(jnp.int32) // 128  # depends on the queries, as real ones do
        scores = match_score(layer.codes, turned, weight_bits=8)
        indices, is_real = select_tokens(scores[:, 0], lengths + 1, selection, score_range)
        return sparse_attention(queries[:, 0], layer.keys, layer.values, indices, is_real)[:, None], layer

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def loop(name: str, layers, lengths, selectors, queries, keys, values):
        def step(done, carry):
            layers, queries = carry
            written = []
            for layer, selector in zip(layers, selectors, strict=True):
                if name == "reading":
                    out, layer = read(queries, layer, lengths + done)
                elif name == "sparse":
                    out, layer = attend_sparsely(queries, keys, values, layer, lengths + done, selector, selection)
                else:
                    out, layer = attend_densely(queries, keys, values, layer, lengths + done, None, cfg.attention)
                queries = (queries + 1e-3 * out).astype(queries.dtype)  # each layer waits for the one before
                written.append(layer)
            return tuple(written), queries

        return lax.fori_loop(0, steps, step, (layers, queries))

    names = [name for method in cfg.methods for name in (("sparse", "reading") if method == "sparse" else ("dense",))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    filled = jnp.asarray(lengths, jnp.int32)
    for _ in range(cfg.rounds + 1):  # the first round compiles and warms up
        for name in seconds:
            start = time.perf_counter()
            layers, out = loop(name, layers, filled, selectors, *new)
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / steps / len(selectors))
    return {name: times[1:] for name, times in seconds.items()}


def _ratio(times: list[float], others: list[float]) -> float:
    """How often the second median goes into the first."""
    return statistics.median(times) / statistics.median(others)


def _spread(times: list[float]) -> str:
    """Median and range in milliseconds."""
    return f"{statistics.median(times) * 1e3:.3f} ({min(times) * 1e3:.3f} to {max(times) * 1e3:.3f})"


def main(cfg: DecodeSpeedConfig) -> dict:
    """Time it, print the table and one line of JSON; returns what the line holds."""
    console = Console(highlight=False)
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(automatic if cfg.dtype == "auto" else cfg.dtype)
    selection = SelectionConfig(keep=cfg.keep, min_context=0)
    decode = DecodeConfig(
        selection=selection, prefill_chunk=cfg.prefill_chunk, attention=cfg.attention, block=cfg.new_tokens
    )
    model_cfg = PRESETS[cfg.preset]
    if cfg.model is None:
        hash_cfg = hashing.HashConfig(code_bits=cfg.code_bits)
        room = max(cfg.lengths) + cfg.new_tokens * (cfg.rounds + 1)
        plan = plan_memory(model_cfg, dtype, len(cfg.lengths), room, cfg.prefill_chunk or 2048, hash_cfg, selection)
        console.print(f"memory: {plan.describe()}")
        check_memory(plan, available_bytes())
    model_cfg, params, selector = load(cfg, dtype)

    engines = {name: Engine(model_cfg, params, selector if name == "sparse" else None, decode) for name in cfg.methods}
    clocks = {name: time_model(cfg, engine, cfg.lengths) for name, engine in engines.items()}
    times = list(zip(*zip(*clocks.values(), strict=True), strict=True))  # a round of each clock in turn
    results: dict[str, dict] = {}
    for (name, engine), (prefill, _, *steps) in zip(engines.items(), times, strict=True):
        results[name] = {
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": sum(cfg.lengths) / prefill,
            "step_seconds": steps,
            "decode_tokens_per_second": len(cfg.lengths) / statistics.median(steps),
            "compile_seconds": engine.compile_seconds,
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
        read_by = selector.cfg if name == "sparse" else None
        reads = step_reads(model_cfg, dtype, list(cfg.lengths), read_by, selection, 0)
        results[name]["reads"] = dataclasses.asdict(reads)
    if cfg.layer:
        engines.clear()  # and with them the caches
        clocks.clear()
        engine = Engine(model_cfg, params, selector, decode)
        for kind, seconds in time_attention(cfg, engine, cfg.lengths).items():
            results["sparse" if kind == "reading" else kind][f"{kind}_layer_seconds"] = seconds
    console.print(_table(cfg, results))
    summary = {
        "eval": "decode",
        "config": {**dataclasses.asdict(cfg), "selector": str(cfg.selector), "dtype": dtype.name},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "results": results,
    }
    if len(results) == 2:
        dense, sparse = results["dense"], results["sparse"]
        summary["step_ratio"] = _ratio(dense["step_seconds"], sparse["step_seconds"])
        if cfg.layer:
            for kind in ("sparse", "reading"):
                ratio = _ratio(dense["dense_layer_seconds"], sparse[f"{kind}_layer_seconds"])
                summary[f"{kind}_layer_ratio"] = ratio
    print(json.dumps(summary))
    return summary


def _table(cfg: DecodeSpeedConfig, results: dict[str, dict]) -> Table:
    """Dense beside sparse."""
    table = Table(title=f"{cfg.model or cfg.preset}, prompts of {', '.join(map(str, cfg.lengths))} tokens")
    table.add_column("")
    rows: list[list[str]] = [
        ["prefill, tokens/s"], ["decode, tokens/s"], ["step, ms (range)"], ["attention per layer, ms"],
        ["of it score, select, read"],
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
                _spread(result[f"{name}_layer_seconds"]) if cfg.layer else "-",
                _spread(result["reading_layer_seconds"]) if cfg.layer and name == "sparse" else "-",
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


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight eval decode`."""
    return cli.run(main, DecodeSpeedConfig, "spotlight eval decode", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
