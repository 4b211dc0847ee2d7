"""Log-likelihoods of continuations and greedy texts with a method: what `eval.harness` asks of a model.

Everything here takes token ids and knows nothing of the harness. Requests are sorted by length, longest first, so that
memory runs out at once or never, and are answered in the order they came.
"""

import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from eval.common.cases import EvalCase
from eval.common.flags import ForwardConfig
from eval.methods import plain_name
from eval.model.attend import row_bytes
from eval.model.completion import Completer, engine_traffic, is_by_engine, open_completer
from eval.model.load import EvalModel
from eval.model.scores import (
    Context,
    Sequence,
    SequenceScores,
    check_scores,
    prefill,
    run_densely,
    score_next,
    score_sequence,
    score_tokens,
)
from spotlight_jax.cache import bucket_length
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import generate, make_engine
from spotlight_jax.models.decoder import embed_tokens, unembed_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.stops import Stops, find_stops
from spotlight_jax.text_stream import TextStream

TAIL = 256  # tokens scored after a prompt that is passed once; longer ones in one pass over everything
SHORTEST_TAIL = 16

Progress = Callable[[int, int], None]
Numbers = Array | np.ndarray  # of a request's queries


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to score: those of `tokens` from `scored_from` on, given all before them."""

    tokens: tuple[int, ...]
    scored_from: int  # at least 1: the first token has nothing before it
    sparse_from: int  # queries at positions below it read everything


@dataclasses.dataclass(frozen=True)
class Answer:
    """The likelihood of a request, and what the queries read that predict its tokens."""

    log_prob: float
    is_greedy: bool
    sparse: int  # queries that left tokens out
    tokens_read: float  # sums over the queries
    bytes_read: float


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How texts are continued."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()


@dataclasses.dataclass(frozen=True)
class Text:
    """A continuation, and what the steps after its first token read."""

    text: str
    tokens: int
    sparse: int  # steps that left tokens out
    tokens_read: float  # sums over the steps
    bytes_read: float


@dataclasses.dataclass
class TaskStats:
    """What a method did for one task."""

    requests: int = 0
    truncated: int = 0
    scored: int = 0  # tokens that were scored or written
    sparse: int = 0  # of these, tokens chosen by a query that left tokens out
    tokens_read: float = 0.0
    bytes_read: float = 0.0
    answered: int = 0  # tokens that the two sums above are of

    def add(self, found: Answer | Text, scored: int, queries: int) -> None:
        """Count one request, of whose tokens `scored` were scored or written, and what `queries` read for them."""
        self.requests += 1
        self.scored += scored
        self.answered += queries
        self.sparse += found.sparse
        self.tokens_read += found.tokens_read
        self.bytes_read += found.bytes_read

    def row(self) -> dict[str, int | float]:
        """Return the fields of a result."""
        answered = max(self.answered, 1)
        return {
            "requests": self.requests,
            "truncated": self.truncated,
            "tokens_scored": self.scored,
            "tokens_by_selection": self.sparse,
            "tokens_read": round(self.tokens_read / answered, 2),
            "bytes_read": round(self.bytes_read / answered),
        }


def _tail_width(tail: int) -> int:
    return max(SHORTEST_TAIL, 1 << (tail - 1).bit_length())


class Scorer:
    """A model with one method and one budget, which scores and continues texts."""

    def __init__(self, model: EvalModel, case: EvalCase, batch: int = 1, seed: int = 0) -> None:
        """Open the method; compile nothing yet.

        Args:
            model: the model and its selector.
            case: the method and its budget.
            batch: sequences scored or continued together where the method allows it.
            seed: of what the method draws at random.
        """
        self.case, self.batch = case, batch
        self.model, name = model.for_method(case.method)
        self.method = self.model.open_method(name, case.selection, seed)
        self.limit = model.cfg.max_context
        self.is_dense = len(set(self.method.dense_layers) & set(range(model.cfg.layers))) == model.cfg.layers
        self.seed = seed
        self._engine: Engine | None = None
        self._completers: dict[tuple[int, ...], Completer] = {}

    def score(self, requests: Several[Request], progress: Progress | None = None) -> list[Answer]:
        """Return answers in the order of the requests, none of which passes the context."""
        order = sorted(range(len(requests)), key=lambda place: (-len(requests[place].tokens), requests[place].tokens))
        ordered = [requests[place] for place in order]
        answers: list[Answer | None] = [None] * len(requests)
        found = self._score_batches(ordered) if self.is_dense else self._score_singly(ordered)
        for done, (place, answer) in enumerate(zip(order, found, strict=True), start=1):
            answers[place] = answer
            if progress is not None:
                progress(done, len(requests))
        return [answer for answer in answers if answer is not None]

    def _score_batches(self, requests: Several[Request]) -> Iterator[Answer]:
        """Pass over several sequences at once, densely, padded on the right where no query sees it."""
        cfg, params = self.model.cfg, self.model.params
        ends = unembed_params(params)
        for start in range(0, len(requests), self.batch):
            group = requests[start : start + self.batch]
            slots = min(bucket_length(len(group[0].tokens)), self.limit)
            padded = np.zeros((self.batch, slots), np.int32)
            for row, request in enumerate(group):
                padded[row, : len(request.tokens)] = request.tokens
            tokens = jnp.asarray(padded)
            x = run_densely(self.model, embed_tokens(params, tokens, cfg), 0, cfg.layers)
            token_bytes = cfg.layers * cfg.kv_heads * row_bytes(cfg.head_dim, x.dtype)
            for row, request in enumerate(group):
                first = request.scored_from - 1  # the query that predicts the first scored token
                width = min(_tail_width(len(request.tokens) - first), slots)
                begin = min(first, slots - width)
                piece = slice(begin, begin + width)
                best, log_probs = score_next(ends, x[row : row + 1, piece], tokens[row : row + 1, piece], cfg)
                scored = slice(first - begin, len(request.tokens) - 1 - begin)
                is_greedy = np.asarray(best)[scored] == request.tokens[request.scored_from :]
                lengths = np.arange(request.scored_from, len(request.tokens))
                yield self._answer(request, log_probs[scored], is_greedy, lengths, lengths * token_bytes)

    def _score_singly(self, requests: Several[Request]) -> Iterator[Answer]:
        """Score one request at a time; those that begin alike share the pass over their beginning."""
        shared: tuple[tuple[int, ...], Context] | None = None
        for request in requests:
            begin = min(request.sparse_from, request.scored_from - 1)
            if begin < 1 or len(request.tokens) - begin > TAIL:
                yield self._score_whole(request)
                continue
            prompt, slots = request.tokens[:begin], bucket_length(begin)
            if shared is None or shared[0] != prompt:
                shared = (prompt, prefill(self.model, prompt, slots + TAIL, slots + TAIL, slots))
            yield self._score_tail(request, shared[1])

    def _score_whole(self, request: Request) -> Answer:
        length = len(request.tokens)
        sequence = Sequence(np.asarray(request.tokens, np.int32), min(bucket_length(length), self.limit))
        cfg = ForwardConfig(dense_prefix=request.sparse_from)
        return self._answer_by(score_sequence(self.model, sequence, self.method, self.case.selection, cfg), request, 0)

    def _score_tail(self, request: Request, context: Context) -> Answer:
        tokens = request.tokens[context.length :]
        args = self.method, self.case.selection, context, request.sparse_from, _tail_width(len(tokens))
        return self._answer_by(score_tokens(self.model, tokens, *args), request, context.length)

    def _answer_by(self, scores: SequenceScores, request: Request, start: int) -> Answer:
        """Return the answer by the scores of a request's tokens from `start` on."""
        scored = slice(request.scored_from - 1 - start, len(request.tokens) - 1 - start)
        traffic = scores.tokens_read[scored], scores.bytes_read[scored]
        return self._answer(request, scores.log_probs[scored], scores.is_greedy[scored], *traffic)

    def stops(self, settings: GenerationSettings) -> Stops:
        """Return what ends a text with these settings."""
        return find_stops(self.model.cfg, self.model.tokenizer, settings.stop)

    def generate(
        self, prompts: Several[Several[int]], settings: GenerationSettings, progress: Progress | None = None
    ) -> list[Text]:
        """Continue prompts that leave capacity in the context; texts in the order of the prompts.

        `dense` and `spotlight` go through the product's engine, in batches; other methods one by one, greedily.
        """
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        by_engine = is_by_engine(self.method, self.model.selector)
        if not by_engine and settings.sampling.temperature > 0:
            raise InputError(f"method '{self.case.method}' generates greedily; the task asks for a temperature")
        size = self.batch if by_engine else 1
        texts: dict[int, Text] = {}
        for start in range(0, len(order), size):
            group = order[start : start + size]
            batch = [prompts[place] for place in group]
            found = self._generate_batch(batch, settings) if by_engine else self._generate_one(batch[0], settings)
            texts |= zip(group, found, strict=True)
            if progress is not None:
                progress(len(texts), len(prompts))
        return [texts[place] for place in range(len(prompts))]

    def _generate_batch(self, prompts: Several[Several[int]], settings: GenerationSettings) -> list[Text]:
        selection, tokenizer = self.case.selection, self.model.tokenizer
        cfg = GenerateConfig(
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            sampling=settings.sampling,
            selection=selection,
            tail=self.method.tail is not None,
        )
        selector = self.model.selector if plain_name(self.method.name) == "spotlight" else None
        assert tokenizer is not None, "who gives texts has a tokenizer"
        model = BaseModel(self.model.cfg, self.model.params, tokenizer, self.model.source)
        engine = self._engine = self._engine or make_engine(model, cfg, selector)
        texts = []
        for found in generate(model, prompts, cfg, selector, engine):
            lengths = range(found.prompt_tokens + 1, found.prompt_tokens + len(found.tokens))
            steps = engine_traffic(engine, lengths, selection)
            sparse = sum(step.tokens < length for step, length in zip(steps, lengths, strict=True))
            moved = float(sum(step.bytes_keys_values + step.bytes_codes for step in steps))
            texts.append(Text(found.text, len(found.tokens), sparse, float(sum(step.tokens for step in steps)), moved))
        return texts

    def _generate_one(self, prompt: Several[int], settings: GenerationSettings) -> list[Text]:
        assert self.model.tokenizer is not None, "who gives texts has a tokenizer"
        ends = self.stops(settings).tokens
        if ends not in self._completers:
            self._completers[ends] = open_completer(
                self.model, self.method.name, self.case.selection, self.seed, stop_tokens=ends
            )
        completion = self._completers[ends].complete(list(prompt), settings.max_new_tokens)
        stream = TextStream(self.model.tokenizer, settings.stop)
        text = stream.push(list(completion.tokens)) + stream.finish()
        steps = len(completion.tokens) - 1
        mean_length = len(prompt) + 1 + (steps - 1) / 2
        sparse = steps if completion.tokens_read < mean_length - 0.5 else 0
        return [
            Text(text, len(completion.tokens), sparse, completion.tokens_read * steps, completion.bytes_read * steps)
        ]

    def _answer(
        self, request: Request, log_probs: Numbers, is_greedy: Numbers, tokens_read: Numbers, bytes_read: Numbers
    ) -> Answer:
        """Sum over the queries at scored_from - 1 ... of a request."""
        check_scores(np.asarray(log_probs))
        lengths = np.arange(request.scored_from, len(request.tokens))  # what each could read
        return Answer(
            log_prob=float(np.sum(np.asarray(log_probs, np.float64))),
            is_greedy=bool(np.all(np.asarray(is_greedy))),
            sparse=int(np.sum(np.asarray(tokens_read) < lengths - 0.5)),  # means of counts, in float32
            tokens_read=float(np.sum(tokens_read)),
            bytes_read=float(np.sum(bytes_read)),
        )
