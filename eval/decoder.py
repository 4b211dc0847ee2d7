"""Generation with any method: dense prefill, then token by token through the very `Method` that evaluation uses.

A slow reference: each step makes the index anew and scores all slots of the cache. `dense` and `spotlight` go through
the product's engine instead, which writes the same tokens (a test shows it).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eval.attend import attend_with, causal_budgets
from eval.config import Subject
from eval.methods.base import Method
from spotlight_jax.attention import causal_attention
from spotlight_jax.cache import LayerCache, append
from spotlight_jax.config.generation import DecodeConfig, RowConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.decode_step import DecodeState
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.memory import step_reads
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, apply_layer, embed_tokens, unembed
from spotlight_jax.sampling import check_chosen, pick_best
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.stops import find_stops


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _step_layer(
    layer_params: Params,
    x: Float[Array, "one one embed"],
    cache: LayerCache,
    method: Method | None,
    budgets: Int32[Array, " slots"],
    lengths: Int32[Array, "one"],
    rope_len: Int32[Array, "one"],
    cfg: DecoderConfig,
) -> tuple[Array, LayerCache, dict[str, Array]]:
    """One layer of one step, the new token first appended; `method` is None where the layer reads densely."""
    positions = lengths[:, None]

    def attend(queries: Array, keys: Array, values: Array) -> tuple[Array, tuple[LayerCache, dict[str, Array]]]:
        written = append(cache, keys, values, None, lengths)
        if method is None:
            return causal_attention(queries, written.keys, written.values, offsets=lengths), (written, {})
        out, reads = attend_with(method, queries, written.keys, written.values, budgets, positions, lengths + 1)
        return out, (written, reads)

    x, (written, reads) = apply_layer(layer_params, x, positions, attend, cfg, rope_len)
    return x, written, reads


@functools.partial(jax.jit, static_argnames="cfg")
def _choose(params: Params, x: Float[Array, "one one embed"], cfg: DecoderConfig) -> Int32[Array, ""]:
    return pick_best(unembed(params, x, cfg)[0])[0]


@dataclasses.dataclass(frozen=True)
class Written:
    """What was generated, and what each step that chose a token after the first read."""

    tokens: tuple[int, ...]
    tokens_read: float  # per query: mean over selecting heads, sparse layers and steps
    bytes_read: float  # per step, mean: keys, values and index, of all layers


class Decoder:
    """A model that continues prompts greedily, one at a time, reading as a method does."""

    def __init__(
        self, subject: Subject, method: Method, selection: SelectionConfig, stop_tokens: Sequence[int] = ()
    ) -> None:
        """Compile nothing yet.

        Args:
            subject: the model and the selector that the method reads by; see `Subject.reading`.
            method: opened for it.
            selection: the budget of each step.
            stop_tokens: a text ends after one of them.
        """
        self.subject, self.method, self.selection = subject, method, selection
        self.stop_tokens = tuple(stop_tokens)
        self._by_engine = method.name in ("dense", "spotlight")
        self._engine = self._make_engine(subject.selector if method.name == "spotlight" else None)

    def _make_engine(self, selector: Selector | None) -> Engine:
        selection = dataclasses.replace(self.selection, min_context=0)
        return Engine(self.subject.cfg, self.subject.params, selector, DecodeConfig(selection=selection))

    def write(self, prompt: Sequence[int], max_new_tokens: int) -> Written:
        """Continue a prompt; raises InputError where it is empty or passes the model's context."""
        limit = self.subject.cfg.max_context
        if not prompt or len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {len(prompt)} tokens with {max_new_tokens} new ones does not fit the context of {limit}"
            )
        row = RowConfig(stop_tokens=self.stop_tokens if self._by_engine else ())
        state = self._engine.prefill([list(prompt)], max_new_tokens, rows=[row])
        if self._by_engine:
            return self._write_by_engine(state, max_new_tokens)
        return self._write_by_method(state, max_new_tokens)

    def _write_by_engine(self, state: DecodeState, max_new_tokens: int) -> Written:
        prompt, subject = int(state.cache.lengths[0]), self.subject
        tokens = np.asarray(state.tokens).tolist()
        while not np.asarray(state.is_done).all():
            state, chosen = self._engine.decode(state)
            tokens += chosen[0].tolist()
        tokens = _cut(tokens[:max_new_tokens], self.stop_tokens)
        lengths = list(range(prompt + 1, prompt + len(tokens)))
        hash_cfg = None if self._engine.selector is None else self._engine.selector.cfg
        reads = [step_reads(subject.cfg, self._engine.dtype, [n], hash_cfg, self.selection, 0) for n in lengths]
        return Written(
            tuple(tokens),
            _mean([one.tokens for one in reads]),
            _mean([one.bytes_keys_values + one.bytes_codes for one in reads]),
        )

    def _write_by_method(self, state: DecodeState, max_new_tokens: int) -> Written:
        cfg, params, method = self.subject.cfg, self.subject.params, self.method
        layers, lengths = list(state.cache.layers), state.cache.lengths
        slots = state.cache.max_len
        budgets = causal_budgets(slots, self.selection)
        own = [None if layer in method.dense_layers else method.layer(layer) for layer in range(cfg.layers)]
        token, tokens = int(state.tokens[0]), [int(state.tokens[0])]
        row = 2 * cfg.kv_heads * cfg.head_dim * layers[0].keys.dtype.itemsize
        reads, sizes = [], []
        while len(tokens) < max_new_tokens and token not in self.stop_tokens:
            x = embed_tokens(params, jnp.asarray([[token]], jnp.int32), cfg)
            for layer in range(cfg.layers):
                args = (params[f"layer_{layer}"], x, layers[layer], own[layer], budgets, lengths, state.rope_len)
                x, layers[layer], read = _step_layer(*args, cfg)
                reads += [read["tokens"]] if read else []
                sizes.append(read["bytes"] + read["index_bytes"] if read else row * (lengths + 1)[:, None])
            lengths = lengths + 1
            token = int(_choose(params, x, cfg))
            check_chosen(np.asarray(token))
            tokens.append(token)
        return Written(tuple(tokens), _mean(reads), _mean(sizes) * cfg.layers)


def _mean(values: Sequence) -> float:
    """Of numbers or arrays of one element; 0 of none."""
    return float(np.mean([np.asarray(value, np.float64) for value in values])) if values else 0.0


def _cut(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """Tokens up to the first stop token, which stays."""
    ends = [place for place, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def open_decoder(
    subject: Subject, name: str, selection: SelectionConfig, seed: int = 0, stop_tokens: Sequence[int] | None = None
) -> Decoder:
    """A decoder for a method by its name; by default a text ends with the ids that the model's files name."""
    if stop_tokens is None:
        stop_tokens = find_stops(subject.cfg, subject.tokenizer).tokens
    subject, name = subject.reading(name)
    return Decoder(subject, subject.open_method(name, selection, seed), selection, stop_tokens)
