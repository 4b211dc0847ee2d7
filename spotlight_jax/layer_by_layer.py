"""Decoding by one compiled program for all layers of a kind, which the host calls layer by layer.

`Engine.decode_block` is one program with every layer in it: no step waits for the host, and XLA takes a minute or more
to compile it for each length of the cache and each mode. These compile in seconds; calling them layer by
layer costs milliseconds a step, some 7 % of a short one's work on a CPU.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PyTree

from spotlight_jax.cache import LayerCache
from spotlight_jax.cached_attention import LayerSelector
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.decode_step import DecodeState, Mode, choose, decode_layer, embed_step, fold_step, next_lengths
from spotlight_jax.engine import Engine
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import unembed, unembed_params
from spotlight_jax.sampling import TokenLogprobs
from spotlight_jax.selector.selection import RowBudgets


def begin_step(
    params: PyTree, state: DecodeState, model_cfg: DecoderConfig
) -> tuple[Float[Array, "rows one embed"], Int32[Array, "batch"]]:
    """Return the stream before the first layer, and the sequences' lengths after the step; `state` holds no layers."""
    return embed_step(params, state.tokens, model_cfg), next_lengths(state)


def step_layer(
    layer_params: PyTree,
    x: Float[Array, "rows one embed"],
    layer: LayerCache,
    selector: LayerSelector | None,
    lengths: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    reads: RowBudgets | None,
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "rows one embed"], LayerCache]:
    """Apply one layer of a step, its moments included."""
    x, layer = decode_layer(layer_params, x, layer, selector, lengths, rope_len, reads, model_cfg, cfg, mode, mesh)
    (layer,) = fold_step((layer,), lengths, ends, mesh)
    return x, layer


def end_step(
    params: PyTree,
    x: Float[Array, "rows one embed"],
    ends: Int32[Array, "batch"],
    state: DecodeState,
    model_cfg: DecoderConfig,
) -> tuple[DecodeState, TokenLogprobs | None]:
    """Choose each sequence's next token from the stream after the last layer; `state` holds no layers."""
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=ends))
    return choose(unembed(params, x, model_cfg)[: ends.shape[0], 0], state)


def decode_layer_by_layer(
    engine: Engine, state: DecodeState, mode: Mode, steps: int
) -> tuple[DecodeState, np.ndarray, TokenLogprobs | None]:
    """Decode at least one step and at most `steps`, as `Engine.decode_block` does; the given state is given up.

    Returns:
        The new state, the tokens chosen, [batch, steps taken], and their log-probabilities where the state has some.
    """
    cfg, layers = engine.model_cfg, list(state.cache.layers)
    selectors, outer = engine.selectors(np.asarray(state.cache.code_sets)), unembed_params(engine.params)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=()))
    static: dict[str, Any] = {"model_cfg": cfg, "cfg": engine.cfg, "mesh": engine.mesh}
    tokens: list[np.ndarray] = []
    logprobs: list[TokenLogprobs | None] = []
    while len(tokens) < steps and not (tokens and np.asarray(state.is_done).all()):
        x, ends = engine.run("begin step", begin_step, (outer, state), (), model_cfg=cfg)
        rows = state.cache.lengths, ends, state.rope_len, state.reads
        for index, selector in enumerate(selectors):
            args = engine.params[f"layer_{index}"], x, layers[index], selector, *rows
            own: Mode = "dense" if selector is None else mode  # such layers share a program
            x, layers[index] = engine.run("step layer", step_layer, args, (1, 2), mode=own, **static)
        state, found = engine.run("end step", end_step, (outer, x, ends, state), (), model_cfg=cfg)
        tokens.append(np.asarray(state.tokens))
        logprobs.append(found)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=tuple(layers)))
    return state, np.stack(tokens, axis=1), jax.tree.map(lambda *steps: np.stack(steps, axis=1), *logprobs)
