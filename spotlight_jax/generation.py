"""Text in, text out: prompts to tokens, decoding on the device, tokens to text, and a report of what it took.

For example:

    model = load_model("smollm2-135m")
    selector = load_selector("runs/demo", head_shape(model.cfg))
    for result in generate(model, ["Once upon a time"], GenerateConfig(max_new_tokens=64), selector):
        print(result.text)
"""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from spotlight_jax.config.generation import GenerateConfig, RowConfig, make_decode_config
from spotlight_jax.decode_step import DecodeState
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.memory import StepReads, step_reads
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.tokenizer import Tokenizer
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.selection import sparse_from
from spotlight_jax.stops import find_stops
from spotlight_jax.text_stream import TextStream
from spotlight_jax.token_ids import check_ids, encode_chat, encode_text

STREAM_BLOCK = 4  # steps between two pieces of streamed text


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sequence's continuation."""

    text: str
    """New text, without the prompt, a stop string or special tokens."""
    tokens: tuple[int, ...]
    """Ids of the tokens that were chosen, the one that ends the text included."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    ended_by: str
    """Reason of the end: "stop string", "end of text" or "length"."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a generation took; seconds of prefill and decoding are without compiling, which has seconds of its own."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    reads: StepReads  # of the last step

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, all sequences together."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens decoded per second, all sequences together; each prompt's first token belongs to prefill."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)


def head_shape(cfg: DecoderConfig) -> HeadShape:
    """Return the heads that a selector for this model serves."""
    return HeadShape(cfg.layers, cfg.q_heads, cfg.kv_heads, cfg.head_dim)


def encode_prompts(
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    model_cfg: DecoderConfig,
    is_chat: bool = False,
    most: int | None = None,
) -> list[list[int]]:
    """Encode prompts as token ids; raises InputError for empty ones, and those too long for the model's context.

    Args:
        tokenizer: of the model; None where every prompt is token ids.
        prompts: texts, or token ids.
        max_new_tokens: tokens that must fit the context after each prompt.
        model_cfg: the model's config, for its vocabulary and context.
        is_chat: whether a text is a user's message, put into the model's chat template.
        most: only so many tokens of each prompt, the first ones.
    """
    if isinstance(prompts, str):
        raise InputError("the prompts are one string; give a list of them: [prompt]")
    encoded = []
    limit, vocab = model_cfg.max_context, model_cfg.vocab
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            tokens = list(prompt)
            if not all(isinstance(token, int | np.integer) for token in tokens):
                raise InputError(f"prompt {number} is neither a text nor token ids")
            check_ids(tokens, vocab)
        elif is_chat:
            tokens = encode_chat(tokenizer, [{"role": "user", "content": prompt}], vocab)
        else:
            tokens = encode_text(tokenizer, prompt, vocab)
        tokens = tokens[:most]
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not tokens:
            raise InputError(f"{name} is empty; give at least one token of text")
        if len(tokens) + max_new_tokens > limit:
            raise InputError(
                f"{name} has {len(tokens)} tokens, and with {max_new_tokens} new ones passes the model's context of "
                f"{limit}; shorten it, ask for fewer, or use a model whose config extends its context"
            )
        encoded.append(tokens)
    if not encoded:
        raise InputError("there is no prompt; give at least one")
    return encoded


def make_engine(model: BaseModel, cfg: GenerateConfig, selector: Selector | None = None) -> Engine:
    """Make an engine for this model and these settings; keep it to generate again without compiling."""
    return Engine(model.cfg, model.params, selector, make_decode_config(cfg))


def _without_layers(state: DecodeState) -> DecodeState:
    """What is small of a state: all but what its cache holds."""
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=()))


class Run:
    """One generation in progress: texts so far, and the clock."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        cfg: GenerateConfig,
        state: DecodeState | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prefill the prompts, after the cache of `state` (which is given up) if there is one.

        Args:
            progress: gets the tokens of the longest prompt prefilled so far, and all of them.
        """
        self.engine, self.cfg = engine, cfg
        self._stops = find_stops(engine.model_cfg, tokenizer, cfg.stop, cfg.ignore_eos)
        self._tokenizer, self.prompts = tokenizer, prompts
        self._compiled_before = engine.compile_seconds
        start = time.perf_counter()
        cache = None if state is None else state.cache
        rows = [RowConfig(cfg.sampling, self._stops.tokens, number) for number in range(len(prompts))]
        self.state = engine.prefill(prompts, cfg.max_new_tokens, cache, progress, rows)
        first = np.asarray(self.state.tokens)[:, None]
        self.prefill_seconds = time.perf_counter() - start - (engine.compile_seconds - self._compiled_before)
        leaves, structure = jax.tree.flatten(_without_layers(self.state))
        self._begun = jax.device_get(leaves), structure  # a step writes over the state that it is given
        self._begin(first)

    def _begin(self, first: np.ndarray) -> None:
        """Take each sequence's first token, `[batch, 1]`."""
        self.streams = [TextStream(self._tokenizer, self.cfg.stop) for _ in self.prompts]
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.decode_seconds = 0.0
        self.pieces = self._add(first)

    def again(self, engine: Engine) -> "Run":
        """The same prompts continued anew by an engine without a selector, from keys and values that this run's prompt
        left in the cache: steps have written behind them alone. This run's state is given up.

        Its prefill took what this one's did, and its first tokens are the same.
        """
        assert engine.selector is None, "a selector's codes and moments would be those after this run"
        run = copy.copy(self)
        run.engine, run._compiled_before = engine, engine.compile_seconds
        layers = tuple(dataclasses.replace(layer, codes=None, moments=None) for layer in self.state.cache.layers)
        leaves, structure = self._begun
        begun = jax.tree.unflatten(structure, map(jax.numpy.asarray, leaves))
        sets = jax.numpy.zeros_like(begun.cache.code_sets)
        run.state = dataclasses.replace(begun, cache=dataclasses.replace(begun.cache, layers=layers, code_sets=sets))
        run._begin(np.asarray(begun.tokens)[:, None])
        return run

    def _add(self, tokens: np.ndarray) -> list[str]:
        """Add tokens of each sequence up to where it stopped; returns their new text."""
        pieces = []
        for row, stream in enumerate(self.streams):
            room = self.cfg.max_new_tokens - len(self.tokens[row])
            new = [] if stream.is_stopped or self._ended(row) else tokens[row, :room].tolist()
            ends = [place for place, token in enumerate(new) if token in self._stops.tokens]
            new = new[: ends[0] + 1] if ends else new
            self.tokens[row] += new
            piece = stream.push(new)
            if self._ended(row):
                piece += stream.finish()
            pieces.append(piece)
        return pieces

    def _ended(self, row: int) -> bool:
        tokens = self.tokens[row]
        return len(tokens) >= self.cfg.max_new_tokens or (bool(tokens) and tokens[-1] in self._stops.tokens)

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended."""
        return all(stream.is_stopped or self._ended(row) for row, stream in enumerate(self.streams))

    def step(self, limit: int | None = None) -> list[str]:
        """Decode a block of at most `limit` steps; returns the new text of each sequence."""
        compiled, start = self.engine.compile_seconds, time.perf_counter()
        # a stop string is seen here, not on the device: its sequence stops before the next block
        stopped = np.array([stream.is_stopped for stream in self.streams])
        if stopped.any():
            is_done = jax.numpy.asarray(np.asarray(self.state.is_done) | stopped)
            self.state = dataclasses.replace(self.state, is_done=is_done)
        self.state, tokens = self.engine.decode(self.state, limit)
        self.decode_seconds += time.perf_counter() - start - (self.engine.compile_seconds - compiled)
        self.pieces = self._add(tokens)
        return self.pieces

    def results(self) -> list[Generation]:
        """Return what each sequence has become so far."""
        found = []
        for stream, tokens, prompt in zip(self.streams, self.tokens, self.prompts, strict=True):
            last = tokens[-1] if tokens else -1
            is_stopped = stream.is_stopped or last in self._stops.by_string
            is_end = last in self._stops.tokens
            ended_by = "stop string" if is_stopped else "end of text" if is_end else "length"
            found.append(Generation(stream.text, tuple(tokens), len(prompt), ended_by))
        return found

    def report(self) -> Report:
        """Return times so far and what the last step read."""
        engine = self.engine
        lengths = np.asarray(self.state.cache.lengths).tolist()
        selection = self.cfg.selection
        shortest = sparse_from(selection, len(lengths), jax.default_backend())
        hash_cfg = None if engine.selector is None else engine.selector.cfg
        return Report(
            prompt_tokens=sum(map(len, self.prompts)),
            new_tokens=sum(len(tokens) - 1 for tokens in self.tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            compile_seconds=engine.compile_seconds - self._compiled_before,
            reads=step_reads(engine.model_cfg, engine.dtype, lengths, hash_cfg, selection, shortest, engine.has_tail),
        )


def generate(
    model: BaseModel,
    prompts: Sequence[str | Sequence[int]],
    cfg: GenerateConfig | None = None,
    selector: Selector | None = None,
    engine: Engine | None = None,
) -> list[Generation]:
    """Continue each prompt; every token is read where there is no selector.

    Args:
        model: see `load_model`.
        prompts: texts or token ids, of any lengths; they are decoded together, as one batch.
        cfg: how texts are continued; None: `GenerateConfig()`, greedily for 128 tokens.
        selector: says which tokens are read; see `load_selector`, `fit` and `train`.
        engine: of `make_engine` with the same model, settings and selector, to compile nothing again.

    Returns:
        One `Generation` for each prompt, in order.

    Raises:
        InputError: a prompt that is empty, or passes the model's context with `cfg.max_new_tokens`; another model's
            selector; logits that are not finite.
    """
    run = _start(model, prompts, cfg or GenerateConfig(), selector, engine)
    while not run.is_done:
        run.step()
    return run.results()


def _start(
    model: BaseModel,
    prompts: Sequence[str | Sequence[int]],
    cfg: GenerateConfig,
    selector: Selector | None,
    engine: Engine | None,
) -> Run:
    encoded = encode_prompts(model.tokenizer, prompts, cfg.max_new_tokens, model.cfg)
    for line in find_stops(model.cfg, model.tokenizer, cfg.stop).unmatched:
        warnings.warn(line, stacklevel=3)
    return Run(engine or make_engine(model, cfg, selector), model.tokenizer, encoded, cfg)


def stream(
    model: BaseModel,
    prompt: str | Sequence[int],
    cfg: GenerateConfig | None = None,
    selector: Selector | None = None,
    engine: Engine | None = None,
) -> Iterator[str]:
    """Yield the text after one prompt as it comes; the pieces together are the text that `generate` returns.

    Args and errors as `generate`, with one prompt.
    """
    run = _start(model, [prompt], cfg or GenerateConfig(), selector, engine)
    yield from filter(None, run.pieces)
    while not run.is_done:
        yield from filter(None, run.step(STREAM_BLOCK))
