"""Generation with any method: dense prefill, then token by token through the very `Method` that evaluation uses.

A slow reference: each step makes the index anew and scores all slots of the cache. `dense` and `spotlight` go through
the product's engine instead, which writes the same tokens (a test shows it).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from eval.methods import has_tail, plain_name
from eval.methods.base import Method
from eval.model.load import EvalModel
from eval.model.scores import Context, score_tokens
from spotlight_jax.config.generation import DecodeConfig, RowConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.decode_step import DecodeState
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.memory import StepReads, step_reads
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.stops import find_stops

Read = tuple[float, float]  # tokens and bytes of a step


def is_by_engine(method: Method, selector: Selector | None) -> bool:
    """Return whether the product's engine has this method: with a tail only where the selector was trained for it."""
    if method.tail is None:
        return method.name in ("dense", "spotlight")
    return plain_name(method.name) == "spotlight" and selector is not None and selector.params.tail is not None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens generated, and the mean traffic of the steps that chose all but the first."""

    tokens: tuple[int, ...]
    tokens_read: float  # per query: mean over selecting heads, sparse layers and steps
    bytes_read: float  # per step, mean: keys, values and index, of all layers


def engine_traffic(engine: Engine, lengths: Iterable[int], selection: SelectionConfig) -> list[StepReads]:
    """Return what the engine's steps read that see this many tokens, their new one included."""
    hash_cfg = None if engine.selector is None else engine.selector.cfg
    return [
        step_reads(engine.model_cfg, engine.dtype, [length], hash_cfg, selection, 0, engine.has_tail)
        for length in lengths
    ]


class Completer:
    """A model that continues prompts greedily, one at a time, and reads as a method does."""

    def __init__(
        self, model: EvalModel, method: Method, selection: SelectionConfig, stop_tokens: Sequence[int] = ()
    ) -> None:
        """Compile nothing yet.

        Args:
            model: with the selector that the method reads by; see `EvalModel.for_method`.
            method: opened for it.
            selection: the budget of each step.
            stop_tokens: a text ends after one of them.
        """
        self.model, self.method, self.selection = model, method, selection
        self.stop_tokens = tuple(stop_tokens)
        self._by_engine = is_by_engine(method, model.selector)
        cfg = DecodeConfig(selection=dataclasses.replace(selection, min_context=0), tail=has_tail(method.name))
        selector = model.selector if plain_name(method.name) == "spotlight" else None
        self._engine = Engine(model.cfg, model.params, selector, cfg)

    def complete(self, prompt: Sequence[int], max_new_tokens: int) -> Completion:
        """Continue a prompt; raises InputError where it is empty or passes the model's context."""
        limit = self.model.cfg.max_context
        if not prompt or len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {len(prompt)} tokens with {max_new_tokens} new ones does not fit the context of {limit}"
            )
        complete = self._complete_by_engine if self._by_engine else self._complete_by_method
        tokens, reads = complete(prompt, max_new_tokens)
        means = np.asarray(reads or [(0, 0)], np.float64).mean(axis=0)
        return Completion(tuple(tokens), float(means[0]), float(means[1]))

    def _prefill(self, prompt: Sequence[int], max_new_tokens: int) -> DecodeState:
        row = RowConfig(stop_tokens=self.stop_tokens if self._by_engine else ())
        return self._engine.prefill([list(prompt)], max_new_tokens, rows=[row])

    def _complete_by_engine(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], list[Read]]:
        """Return the tokens, and for each step the tokens and bytes that it read."""
        state = self._prefill(prompt, max_new_tokens)
        tokens = np.asarray(state.tokens).tolist()
        while not np.asarray(state.is_done).all():
            state, chosen = self._engine.decode(state)
            tokens += chosen[0].tolist()
        tokens = _cut(tokens[:max_new_tokens], self.stop_tokens)
        reads = engine_traffic(self._engine, range(len(prompt) + 1, len(prompt) + len(tokens)), self.selection)
        return tokens, [(float(step.tokens), float(step.bytes_keys_values + step.bytes_codes)) for step in reads]

    def _complete_by_method(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], list[Read]]:
        """Return the tokens, and for each step the tokens and bytes that it read."""
        context, token = _context_of(self._prefill(prompt, max_new_tokens))
        tokens, reads = [token], []
        while len(tokens) < max_new_tokens and tokens[-1] not in self.stop_tokens:
            step = score_tokens(self.model, tokens[-1:], self.method, self.selection, context, extends=True)
            tokens.append(int(step.best[0]))
            reads.append((float(step.tokens_read[0]), float(step.bytes_read[0])))
        return tokens, reads


def _context_of(state: DecodeState) -> tuple[Context, int]:
    """Return what the engine made of one prompt, and the first token after it."""
    layers = [(layer.keys, layer.values) for layer in state.cache.layers]
    return Context(layers, int(state.cache.lengths[0]), int(state.rope_len[0])), int(state.tokens[0])


def _cut(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """Return the tokens up to the first stop token, which stays."""
    ends = [place for place, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def open_completer(
    model: EvalModel, name: str, selection: SelectionConfig, seed: int = 0, stop_tokens: Sequence[int] | None = None
) -> Completer:
    """Open a method by its name; by default a text ends with the ids that the model's files name."""
    if stop_tokens is None:
        stop_tokens = find_stops(model.cfg, model.tokenizer).tokens
    model, name = model.for_method(name)
    return Completer(model, model.open_method(name, selection, seed), selection, stop_tokens)
