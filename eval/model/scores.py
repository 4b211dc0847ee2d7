"""A model over token ids with a method: what it makes of every next token, and what its queries read.

Either over a whole sequence at once, or over the tokens after a context, which one dense pass made for all methods.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence as Several

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree

from eval.common.flags import ForwardConfig
from eval.methods.base import Method
from eval.model.attend import (
    Continued,
    KeysValues,
    Prefill,
    Selected,
    Traffic,
    causal_budgets,
    default_chunk,
    dense_traffic,
    row_bytes,
    sum_traffic,
)
from eval.model.load import EvalModel
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Attend, embed_tokens, unembed, unembed_params
from spotlight_jax.models.runner import Dense, run_layers
from spotlight_jax.sampling import check_chosen, pick_best

_LOGIT_BYTES = 2**27  # float32 logits held at once


class Sequence:
    """Token ids, and the stream that leading dense layers made of them: the same for all methods."""

    def __init__(self, tokens: Int32[np.ndarray, "length"], slots: int | None = None) -> None:
        """Pad the tokens to `slots`, so that sequences of other lengths need no compiling."""
        self.length = len(tokens)
        missing = 0 if slots is None else slots - len(tokens)
        self.tokens: Int32[Array, "one slots"] = jnp.asarray(np.pad(tokens, (0, missing)), jnp.int32)[None]
        # after how many dense layers; on the host, where those of all windows of a text are held at once
        self.streams: dict[int, Float[np.ndarray, "one slots embed"]] = {}


@dataclasses.dataclass
class Context:
    """Keys and values of a context in every layer, with capacity for the tokens after it."""

    layers: list[KeysValues]
    length: int  # tokens of the context
    rope_len: int  # of the whole sequence, which `dynamic` RoPE scaling adapts to

    @property
    def capacity(self) -> int:
        """Return the number of tokens that fit in all."""
        return self.layers[0][0].shape[1]


@dataclasses.dataclass(frozen=True)
class SequenceScores:
    """What a model made of tokens with a method, on the host; entry i is about the query of token i."""

    best: Int32[np.ndarray, "length"]  # the most probable next token
    log_probs: Float[np.ndarray, "targets"]  # of each next token; the last one has none
    is_greedy: Bool[np.ndarray, "targets"]  # whether the next token is the most probable one
    tokens_read: Float[np.ndarray, "length"]  # mean over selecting heads and sparse layers
    bytes_read: Float[np.ndarray, "length"]  # keys, values and index, of all layers, the dense ones included
    index_bytes: Float[np.ndarray, "length"]  # of these, the index
    estimated: Float[np.ndarray, "length"]  # share of the attention, mean over query heads and sparse layers


def positions_of(x: Float[Array, "batch length embed"]) -> Int32[Array, "batch length"]:
    """Return 0, 1, ... for each sequence of a stream."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])


def check_length(length: int, cfg: DecoderConfig, what: str = "the window") -> None:
    """Raise InputError where a sequence is longer than the model's context, or has nothing to predict."""
    if length < 2:
        raise InputError(f"{what} has {length} tokens; at least 2 are needed, one to read and one to predict")
    if length > cfg.max_context:
        raise InputError(f"{what} has {length} tokens and passes the model's context of {cfg.max_context}")


def check_scores(log_probs: Float[np.ndarray, "targets"]) -> None:
    """Raise InputError where log-probabilities are not finite: such a model says nothing about methods."""
    if not np.isfinite(log_probs).all():
        raise InputError(
            "the model's log-probabilities are not finite (NaN or Inf): its weights cannot be used, or their dtype is "
            "too narrow; try --dtype float32, or fetch the model again"
        )


def perplexity_of(loss: float) -> float:
    """Return exp of a mean loss in nats a token; raises InputError where that is past any number (from 709.8 on)."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise InputError(
            f"the model's mean loss is {loss:g} nats a token, and its perplexity is past any number: its weights "
            "cannot be used; fetch the model again"
        ) from None


@functools.partial(jax.jit, static_argnames="cfg")
def score_next(
    ends: PyTree, x: Float[Array, "one length embed"], tokens: Int32[Array, "one length"], cfg: DecoderConfig
) -> tuple[Int32[Array, " length"], Float[Array, " targets"]]:
    """Return the most probable next token of every query, and the log-probability of the one that follows it.

    Logits are made for a chunk of positions at a time.
    """
    length = x.shape[1]
    chunk = min(length, max(16, _LOGIT_BYTES // (4 * cfg.vocab)))
    chunks = -(-length // chunk)
    missing = chunks * chunk - length
    targets = jnp.pad(tokens[0, 1:], (0, 1 + missing)).reshape(chunks, chunk)
    streams = jnp.pad(x[0], ((0, missing), (0, 0))).reshape(chunks, chunk, -1)

    def score(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        stream, target = piece
        logits = unembed(ends, stream[None], cfg)[0]
        scores = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return pick_best(logits), scores - jax.nn.logsumexp(logits, axis=1)

    best, log_probs = jax.lax.map(score, (streams, targets))
    return best.reshape(-1)[:length], log_probs.reshape(-1)[: length - 1]


def run_densely(
    model: EvalModel, x: Float[Array, "batch length embed"], start: int, stop: int
) -> Float[Array, "batch length embed"]:
    """Return the stream after the layers from `start` to `stop`, which read everything."""
    layers = range(start, stop)
    for stream, _ in run_layers(model.params, x, positions_of(x), lambda _: Dense(), model.cfg, layers=layers):
        x = stream
    return x


def score_sequence(
    model: EvalModel, sequence: Sequence, method: Method, selection: SelectionConfig, cfg: ForwardConfig | None = None
) -> SequenceScores:
    """Pass a sequence through the model once; every query of a sparse layer reads what `method` selects for it.

    Args:
        sequence: keeps the stream after the leading dense layers, for the next method.
        method: opened for the model.
        selection: the budget of each query.
        cfg: see `ForwardConfig`.
    """
    cfg = cfg or ForwardConfig()
    check_length(sequence.length, model.cfg, "the sequence")
    slots, layers = sequence.tokens.shape[1], model.cfg.layers
    budgets = causal_budgets(sequence.length, selection, cfg.whole_length)
    budgets = jnp.pad(budgets, (0, slots - sequence.length), mode="edge")
    lengths, dense_prefix = jnp.full((1,), sequence.length, jnp.int32), jnp.int32(cfg.dense_prefix)
    chunk = default_chunk(model.cfg.q_heads, slots, cfg.scores_mib)
    leading = next((layer for layer in range(layers) if layer not in method.dense_layers), layers)
    x = _leading_stream(model, sequence, leading)
    positions = positions_of(x)

    def attend_of(layer: int) -> Attend:
        if layer in method.dense_layers:
            return Dense()
        return Selected(method.layer(layer), budgets, positions, lengths, dense_prefix, chunk)

    traffic: list[Traffic | None] = [None] * leading
    for stream, read in run_layers(model.params, x, positions, attend_of, model.cfg, layers=range(leading, layers)):
        x = stream
        traffic.append(read)
    return _score(model, sequence.tokens, sequence.length, x, positions, traffic)


def _leading_stream(model: EvalModel, sequence: Sequence, count: int) -> Float[Array, "one length embed"]:
    """Return the stream after `count` dense layers, from the farthest that is known."""
    known = max((depth for depth in sequence.streams if depth <= count), default=0)
    x = jnp.asarray(sequence.streams[known]) if known else embed_tokens(model.params, sequence.tokens, model.cfg)
    x = run_densely(model, x, known, count)
    if count < model.cfg.layers:
        sequence.streams[count] = jax.device_get(x)
    return x


def prefill(
    model: EvalModel, tokens: Several[int] | Int32[np.ndarray, "length"], capacity: int, total: int, slots: int = 0
) -> Context:
    """Pass over a context densely.

    Args:
        tokens: the context.
        capacity: tokens to hold; the same for all contexts, so that what follows compiles once.
        total: tokens of the context and what will follow it.
        slots: pad the tokens to this many, so that contexts of other lengths need no compiling; the tokens that
            follow the context overwrite what is past it, or never see it.
    """
    padded = np.pad(np.asarray(tokens, np.int32), (0, max(slots - len(tokens), 0)))
    x = embed_tokens(model.params, jnp.asarray(padded)[None], model.cfg)
    attend = Prefill(capacity)
    layers = run_layers(model.params, x, positions_of(x), lambda _: attend, model.cfg, jnp.int32(total))
    return Context([cached for _, cached in layers], len(tokens), total)


def score_tokens(
    model: EvalModel,
    tokens: Several[int] | Int32[np.ndarray, "length"],
    method: Method,
    selection: SelectionConfig,
    context: Context,
    sparse_from: int = 0,
    width: int | None = None,
    extends: bool = False,
) -> SequenceScores:
    """Pass the tokens after a context through the model; each reads what is before it as `method` does.

    Args:
        tokens: what follows the context.
        method: opened for the model.
        selection: the budget of each query, by the tokens before it.
        context: see `prefill`.
        sparse_from: queries at positions below it read everything.
        width: pad the tokens to this many, so that other counts of them need no compiling.
        extends: the tokens become part of the context; else it stays as it is.
    """
    count, capacity = len(tokens), context.capacity
    width = count if width is None else width
    padded = jnp.asarray(np.pad(np.asarray(tokens, np.int32), (0, width - count)))[None]
    # a query past the tokens writes a key that no real query sees; `capacity` must hold those too
    assert context.length + width <= capacity, f"{context.length} + {width} tokens in a capacity of {capacity}"
    budgets, chunk = causal_budgets(capacity, selection), default_chunk(model.cfg.q_heads, capacity)
    start, lengths = jnp.int32(context.length), jnp.full((1,), context.length + count, jnp.int32)
    x = embed_tokens(model.params, padded, model.cfg)
    positions = start + positions_of(x)

    def attend_of(layer: int) -> Attend:
        selected = None
        if layer not in method.dense_layers:
            selected = Selected(method.layer(layer), budgets, positions, lengths, jnp.int32(sparse_from), chunk)
        return Continued(context.layers[layer], start, selected)

    traffic: list[Traffic | None] = []
    passed = run_layers(model.params, x, positions, attend_of, model.cfg, jnp.int32(context.rope_len))
    for layer, (stream, (cached, read)) in enumerate(passed):
        x = stream
        traffic.append(read)
        if extends:
            context.layers[layer] = cached
    context.length += count * extends
    return _score(model, padded, count, x, positions, traffic)


def _score(
    model: EvalModel,
    tokens: Int32[Array, "one width"],
    count: int,
    x: Float[Array, "one width embed"],
    positions: Int32[Array, "one width"],
    layers: Several[Traffic | None],
) -> SequenceScores:
    """Return the scores of the first `count` tokens, from the stream after the last layer and the traffic of all."""
    cfg = model.cfg
    whole = sum_traffic(layers, dense_traffic(positions, cfg.kv_heads, row_bytes(cfg.head_dim, x.dtype)))
    best, log_probs = score_next(unembed_params(model.params), x, tokens, cfg)
    moved = (whole.bytes + whole.index_bytes)[0], whole.index_bytes[0]
    found = best, tokens[0], log_probs, whole.tokens[0], *moved, whole.estimated[0]
    chosen, given, scored, *read = (np.asarray(array)[:count] for array in jax.device_get(found))
    check_scores(scored[: count - 1])
    check_chosen(chosen)
    return SequenceScores(chosen, scored[: count - 1], chosen[:-1] == given[1:], *read)
