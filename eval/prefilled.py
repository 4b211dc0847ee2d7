"""A dense pass over a prompt, done once, and what every method makes of the tokens after it."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eval.attend import Selected, causal_budgets, default_chunk, dense_reads, row_bytes
from eval.forward import check_scores
from eval.methods.base import Method
from spotlight_jax.attention import causal_attention
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Attend, Params, embed_tokens, unembed, unembed_params
from spotlight_jax.models.runner import run_layers

KeysValues = tuple[
    Float[Array, "one room kv_heads head_dim"],
    Float[Array, "one room kv_heads head_dim"],
]


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Keys and values of a prompt in every layer, with room for the tokens after it."""

    layers: tuple[KeysValues, ...]
    length: int  # tokens of the prompt
    rope_len: int  # of the whole sequence, which `dynamic` RoPE scaling adapts to

    @property
    def room(self) -> int:
        """Tokens that fit in all."""
        return self.layers[0][0].shape[1]


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a method made of the tokens after a prompt, on the host; entry i is about the query of tail token i."""

    best: Int32[np.ndarray, "tail"]  # the most probable next token
    log_probs: Float[np.ndarray, "next"]  # of each next tail token; the last one has none
    tokens_read: Float[np.ndarray, "tail"]  # mean over selecting heads and sparse layers
    bytes_read: Float[np.ndarray, "tail"]  # keys, values and index, of all layers, the dense ones included
    index_bytes: Float[np.ndarray, "tail"]  # of these, the index


def prefill(
    params: Params, cfg: DecoderConfig, tokens: Int32[np.ndarray, "length"], room: int, total: int
) -> Prefilled:
    """Pass over a prompt densely.

    Args:
        params: of the model.
        cfg: the model's.
        tokens: the prompt.
        room: tokens to hold; the same for all prompts, so that what follows compiles once.
        total: tokens of the prompt and what will follow it.
    """
    x = embed_tokens(params, jnp.asarray(tokens, jnp.int32)[None], cfg)
    positions, attend = jnp.arange(x.shape[1], dtype=jnp.int32)[None], Kept(room)
    layers = [cached for _, cached in run_layers(params, x, positions, lambda layer: attend, cfg, jnp.int32(total))]
    return Prefilled(tuple(layers), len(tokens), total)


@flax.struct.dataclass
class Kept:
    """Dense attention that gives back keys and values, filled up to `room` tokens."""

    room: int = flax.struct.field(pytree_node=False)

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, KeysValues]:
        """See `Attend`."""
        missing = ((0, 0), (0, self.room - keys.shape[1]), (0, 0), (0, 0))
        return causal_attention(queries, keys, values), (jnp.pad(keys, missing), jnp.pad(values, missing))


@flax.struct.dataclass
class AfterPrompt:
    """Attention of the tokens after a prompt: written behind its keys and values first, then read."""

    cached: KeysValues
    start: Int32[Array, ""]
    selected: Selected | None  # None: a dense layer

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, dict[str, Array]]:
        """See `Attend`."""
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, self.start, axis=1)
            for old, new in zip(self.cached, (keys, values), strict=True)
        )
        if self.selected is not None:
            return self.selected(queries, keys, values)
        positions = self.start + jnp.arange(queries.shape[1], dtype=jnp.int32)[None]
        reads = dense_reads(positions, keys.shape[2], row_bytes(keys))
        return causal_attention(queries, keys, values, offsets=self.start[None]), reads


def pass_tail(
    params: Params,
    cfg: DecoderConfig,
    prompt: Prefilled,
    tokens: Int32[np.ndarray, "tail"],
    method: Method,
    selection: SelectionConfig,
    sparse_from: int,
    width: int | None = None,
) -> Tail:
    """Teacher-forced pass over the tokens after a prompt, each of which reads what is before it as `method` does.

    Args:
        params: of the model.
        cfg: the model's.
        prompt: see `prefill`.
        tokens: what follows the prompt.
        method: see `open_method`.
        selection: the budget of each query, by the tokens before it.
        sparse_from: queries at positions below it read everything.
        width: pad the tail to this many tokens, so that tails of other lengths need no compiling.
    """
    count = len(tokens)
    width = count if width is None else width
    padded = jnp.asarray(np.pad(np.asarray(tokens, np.int32), (0, width - count)))[None]
    # a query past the tail writes a key that no real query sees; `room` must hold those too
    room = prompt.room
    assert prompt.length + width <= room, f"{prompt.length} + {width} tokens in room for {room}"
    budgets = causal_budgets(room, selection)
    chunk = min(width, default_chunk(cfg.q_heads, room))
    start, lengths = jnp.int32(prompt.length), jnp.full((1,), prompt.length + count, jnp.int32)
    is_sparse = [layer not in method.dense_layers for layer in range(cfg.layers)]
    x = embed_tokens(params, padded, cfg)
    sums: dict[str, Array] = {}
    read = jnp.zeros((1, width), jnp.float32)
    positions = start + jnp.arange(width, dtype=jnp.int32)[None]

    def attend_of(layer: int) -> Attend:
        selected = None
        if is_sparse[layer]:
            selected = Selected(method.layer(layer), budgets, positions, lengths, jnp.int32(sparse_from), chunk)
        return AfterPrompt(prompt.layers[layer], start, selected)

    passed = run_layers(params, x, positions, attend_of, cfg, jnp.int32(prompt.rope_len))
    for layer, (after, reads) in enumerate(passed):
        x = after
        if is_sparse[layer] or not any(is_sparse):
            read = read + reads["tokens"] / (sum(is_sparse) or cfg.layers)
        sums = {name: sums.get(name, 0) + value for name, value in reads.items()}
    best, log_probs = _score(unembed_params(params), x, padded, cfg)
    found = best, log_probs, read[0], (sums["bytes"] + sums["index_bytes"])[0], sums["index_bytes"][0]
    cut = [np.asarray(array)[:count] for array in jax.device_get(found)]
    check_scores(cut[1][:-1])
    return Tail(cut[0], cut[1][:-1], *cut[2:])


@functools.partial(jax.jit, static_argnames="cfg")
def _score(
    ends: Params, x: Float[Array, "one tail embed"], tokens: Int32[Array, "one tail"], cfg: DecoderConfig
) -> tuple[Int32[Array, " tail"], Float[Array, " tail"]]:
    """The most probable next token of each query, and the log-probability of the tail's own next one."""
    logits = unembed(ends, x, cfg)[0]
    wanted = jnp.roll(tokens[0], -1)
    own = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
    return jnp.argmax(logits, axis=1).astype(jnp.int32), own - jax.nn.logsumexp(logits, axis=1)
