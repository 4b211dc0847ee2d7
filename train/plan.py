"""What a run will take, before it starts: windows, steps, memory, disk."""

import dataclasses
import math

import jax
import numpy as np

from spotlight_jax.config.ranking import PairLoss
from spotlight_jax.errors import InputError
from spotlight_jax.generate import head_shape
from spotlight_jax.memory import GIB, available_bytes
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.losses.targets import most_top
from train.config import LayerwiseConfig, lengths_covered


def estimate_memory(cfg: LayerwiseConfig, model: DecoderConfig, dtype: np.dtype, devices: int) -> dict[str, int]:
    """Bytes per device of the large parts of a step; the flags that bound each are its name's suffix."""
    ranges = len(lengths_covered(cfg, model))
    layers = -(-ranges * model.layers // devices)  # of hash functions: each length has its own
    window, ranking, size = cfg.data.window, cfg.ranking, dtype.itemsize
    shapes = param_shapes(model, dtype)
    is_whole = cfg.weights == "device" or jax.default_backend() == "cpu"
    kept = shapes if is_whole else shapes["layer_0"]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept)) * size
    keys = window * model.kv_heads * model.head_dim * size
    queries = ranking.queries * model.q_heads * model.head_dim * size
    code_heads, _ = cfg.hash.code_shape(model.q_heads, model.kv_heads)
    at_once = min(ranking.queries_at_once, ranking.queries)
    rows = model.q_heads * at_once
    scores, tops = (3, min(ranking.tops, most_top(window, ranking))) if isinstance(ranking, PairLoss) else (6, 0)
    loss = (
        cfg.layers_at_once
        * 4
        * (
            scores * rows * window  # true scores and learned ones, sorted for their top
            + 4 * code_heads * window * cfg.hash.code_bits  # soft codes and their gradients
            + 2 * rows * tops * cfg.hash.code_bits  # codes of the sampled top keys
        )
    )
    one_layer = dataclasses.replace(head_shape(model), layers=1)
    trained = jax.eval_shape(lambda: jax.tree.leaves(init_functions(jax.random.key(0), cfg.hash, one_layer).weights))
    hashes = sum(math.prod(leaf.shape) for leaf in trained)
    held_out = cfg.data.held_out_windows * (keys + cfg.measure.queries * model.q_heads * model.head_dim * size)
    return {
        "frozen model" if is_whole else "one layer of the frozen model": weights,
        "queries and keys of a window (--data.window)": layers * devices * (keys + cfg.steps_per_window * queries),
        "held-out windows (--data.held-out-windows)": -(-model.layers // devices) * held_out,
        "loss (--layers-at-once, --ranking.queries-at-once)": loss,
        "hash functions and AdamW's moments": (4 if cfg.optimizer.ema else 3) * 4 * layers * hashes,
    }


def check_memory(cfg: LayerwiseConfig, model: DecoderConfig, dtype: np.dtype) -> None:
    """Raise InputError where a run cannot fit a CPU's memory; a GPU refuses by itself what does not fit."""
    devices = jax.devices()
    free = available_bytes(devices[0]) if devices[0].platform == "cpu" else None
    need = sum(estimate_memory(cfg, model, dtype, len(devices)).values())
    if free is not None and need > free:
        narrower = "--dtype bfloat16, " if dtype.itemsize > 2 else ""
        raise InputError(
            f"this takes about {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; take a smaller model, {narrower}"
            "or lower --data.window, --data.held-out-windows or --layers-at-once"
        )


def _describe_lengths(lengths: tuple[int, ...]) -> str:
    """What positions are trained for."""
    if len(lengths) == 1:
        return f"positions up to {lengths[0]:,} tokens"
    return f"hash functions each for sequences up to {', '.join(f'{length:,}' for length in lengths)} tokens"


def describe(cfg: LayerwiseConfig, model: DecoderConfig, dtype: np.dtype, disk: str | None) -> list[str]:
    """The plan, a line each."""
    devices = jax.devices()
    windows = -(-cfg.steps // cfg.steps_per_window)
    memory = estimate_memory(cfg, model, dtype, len(devices))
    lines = [
        f"model     {cfg.model}: {model.layers} layers, {model.q_heads} query / {model.kv_heads} KV heads x "
        f"{model.head_dim}, {dtype.name}",
        f"hash      {cfg.hash.describe()}",
        f"text      {', '.join(cfg.data.train)}: {windows} windows of {cfg.data.window} tokens, "
        f"{windows * cfg.data.window:,} in all; {cfg.data.held_out_windows} held out",
        f"length    {_describe_lengths(lengths_covered(cfg, model))}",
        f"steps     {cfg.steps}, {cfg.steps_per_window} per window, {cfg.ranking.queries} queries each",
        f"device    {len(devices)} x {devices[0].device_kind}",
        f"memory    about {sum(memory.values()) / GIB:.1f} GiB per device: "
        + "; ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items()),
    ]
    if disk:
        lines.append(f"disk      {disk}")
    return lines
