"""A model over whole sequences, layer by layer, as a method reads: what it makes of every next token."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree

from eval.attend import Selected, causal_budgets, default_chunk, dense_reads
from eval.flags import ForwardConfig
from eval.methods.base import Method
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Attend, Params, embed_tokens, unembed, unembed_params
from spotlight_jax.models.runner import Dense, run_layers

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


@flax.struct.dataclass
class Passed:
    """What a pass over a sequence gave, on the host; entry i of the first two is about token i + 1."""

    log_probs: Float[np.ndarray, "targets"]  # of each next token
    is_greedy: Bool[np.ndarray, "targets"]  # whether it is the most probable one
    tokens_read: Float[np.ndarray, "length"]  # by the query at each position: mean over selecting heads, sparse layers
    bytes_read: Float[np.ndarray, "length"]  # keys, values and index, of all layers, the dense ones included
    index_bytes: Float[np.ndarray, "length"]  # of these, the index


def positions_of(x: Array) -> Int32[Array, "batch length"]:
    """0, 1, ... in each sequence of a stream."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])


@functools.partial(jax.jit, static_argnames="cfg")
def score_next(
    ends: PyTree, x: Float[Array, "one length embed"], tokens: Int32[Array, "one length"], cfg: DecoderConfig
) -> tuple[Float[Array, " targets"], Bool[Array, " targets"]]:
    """Of every token but the first: its log-probability, and whether none is more probable; in chunks of positions."""
    length = x.shape[1]
    chunk = min(length, max(16, _LOGIT_BYTES // (4 * cfg.vocab)))
    chunks = -(-length // chunk)
    missing = chunks * chunk - length
    targets = jnp.pad(tokens[0, 1:], (0, 1 + missing)).reshape(chunks, chunk)
    streams = jnp.pad(x[0], ((0, missing), (0, 0))).reshape(chunks, chunk, -1)

    def score(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        stream, wanted = piece
        logits = unembed(ends, stream[None], cfg)[0]
        own = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == wanted

    log_probs, is_greedy = jax.lax.map(score, (streams, targets))
    return log_probs.reshape(-1)[: length - 1], is_greedy.reshape(-1)[: length - 1]


def check_length(length: int, cfg: DecoderConfig, what: str = "the window") -> None:
    """Raise InputError where a sequence is longer than the model's context, or has nothing to foretell."""
    if length < 2:
        raise InputError(f"{what} has {length} tokens; at least 2 are needed, one to read and one to foretell")
    if length > cfg.max_context:
        raise InputError(f"{what} has {length} tokens and passes the model's context of {cfg.max_context}")


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats a token; raises InputError where that is past any number (from 709.8 on)."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise InputError(
            f"the model's mean loss is {loss:g} nats a token, whose perplexity is past any number: its weights cannot "
            "be used; fetch the model again"
        ) from None


def pass_sequence(
    params: Params,
    model_cfg: DecoderConfig,
    sequence: Sequence,
    method: Method,
    selection: SelectionConfig,
    cfg: ForwardConfig | None = None,
) -> Passed:
    """One pass over a sequence in which every query of a sparse layer reads what `method` chooses for it.

    Args:
        params: of the model.
        model_cfg: the model's.
        sequence: keeps the stream after the leading dense layers, for the next method.
        method: see `open_method`.
        selection: the budget of each query.
        cfg: see `ForwardConfig`.
    """
    cfg = cfg or ForwardConfig()
    check_length(sequence.length, model_cfg, "the sequence")
    slots, lengths = sequence.tokens.shape[1], jnp.full((1,), sequence.length, jnp.int32)
    budgets = causal_budgets(sequence.length, selection, cfg.whole_length)
    budgets = jnp.pad(budgets, (0, slots - sequence.length), mode="edge")
    dense_prefix = jnp.int32(cfg.dense_prefix)
    chunk = default_chunk(model_cfg.q_heads, slots, cfg.scores_mib)
    is_sparse = [layer not in method.dense_layers for layer in range(model_cfg.layers)]
    leading = is_sparse.index(True) if any(is_sparse) else model_cfg.layers
    x = _leading_stream(params, model_cfg, sequence, leading)
    positions = positions_of(x)
    whole = dense_reads(positions, model_cfg.kv_heads, 2 * model_cfg.head_dim * x.dtype.itemsize)
    sums = {name: leading * read for name, read in whole.items()}
    tokens = jnp.zeros_like(whole["tokens"])

    def attend_of(layer: int) -> Attend:
        if not is_sparse[layer]:
            return Dense()
        return Selected(method.layer(layer), budgets, positions, lengths, dense_prefix, chunk)

    passed = run_layers(params, x, positions, attend_of, model_cfg, layers=range(leading, model_cfg.layers))
    for layer, (after, reads) in enumerate(passed, start=leading):
        x = after
        if is_sparse[layer]:
            tokens = tokens + reads["tokens"] / sum(is_sparse)
        sums = {name: sums[name] + (reads if is_sparse[layer] else whole)[name] for name in sums}
    tokens = tokens if any(is_sparse) else whole["tokens"]
    log_probs, is_greedy = score_next(unembed_params(params), x, sequence.tokens, model_cfg)
    targets = [np.asarray(array)[: sequence.length - 1] for array in (log_probs, is_greedy)]
    check_scores(targets[0])
    read = tokens[0], (sums["bytes"] + sums["index_bytes"])[0], sums["index_bytes"][0]
    return Passed(*targets, *(np.asarray(array)[: sequence.length] for array in read))


def check_scores(log_probs: Float[np.ndarray, "targets"]) -> None:
    """Raise InputError where log-probabilities are not finite: such a model says nothing about methods."""
    if not np.isfinite(log_probs).all():
        raise InputError(
            "the model's log-probabilities are not finite (NaN or Inf): its weights cannot be used, or their dtype is "
            "too narrow; try --dtype float32, or fetch the model again"
        )


def _leading_stream(
    params: Params, cfg: DecoderConfig, sequence: Sequence, count: int
) -> Float[Array, "one length embed"]:
    """The stream after `count` dense layers, from the farthest that is known."""
    known = max((depth for depth in sequence.streams if depth <= count), default=0)
    x = jnp.asarray(sequence.streams[known]) if known else embed_tokens(params, sequence.tokens, cfg)
    for after, _ in run_layers(params, x, positions_of(x), lambda layer: Dense(), cfg, layers=range(known, count)):
        x = after
    if count < cfg.layers:
        sequence.streams[count] = jax.device_get(x)
    return x
