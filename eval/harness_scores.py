"""Log-likelihoods of continuations and greedy texts, as a method reads: what `eval.harness` asks of a model.

Everything here takes token ids and knows nothing of the harness. Requests are sorted by length, longest first, so that
memory runs out at once or never, and are answered in the order they came.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from eval import forward
from eval.config import Subject, Trial
from eval.decoder import Decoder, open_decoder
from eval.flags import ForwardConfig
from eval.prefilled import Prefilled, pass_tail, prefill
from spotlight_jax.cache import bucket_length
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generate import generate, make_engine
from spotlight_jax.memory import step_reads
from spotlight_jax.models.decoder import embed_tokens, unembed_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.runner import Dense, run_layers
from spotlight_jax.stops import Stops, find_stops
from spotlight_jax.text_stream import TextStream

TAIL = 256  # tokens scored after a prompt that is passed once; longer ones in one pass over everything
SHORTEST_TAIL = 16

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids whose likelihood is asked: those of `tokens` from `scored_from` on."""

    tokens: tuple[int, ...]
    scored_from: int  # at least 1: the first token has nothing before it
    sparse_from: int  # queries at positions below it read everything


@dataclasses.dataclass(frozen=True)
class Answer:
    """The likelihood of a request, and what the queries read that foretold its tokens."""

    log_prob: float
    is_greedy: bool
    sparse: int  # queries that left tokens out
    tokens_read: float  # sums over the queries
    bytes_read: float


@dataclasses.dataclass(frozen=True)
class Wanted:
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
class Tally:
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
        """As fields of a result."""
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


class Reader:
    """A model read by one method with one budget."""

    def __init__(self, subject: Subject, trial: Trial, batch: int = 1, seed: int = 0) -> None:
        """Open the method; compile nothing yet.

        Args:
            subject: the model and its selector.
            trial: the method and its budget.
            batch: sequences passed or continued together where the method allows it.
            seed: of what the method draws at random.
        """
        self.trial, self.batch = trial, batch
        self.subject, name = subject.reading(trial.method)
        self.method = self.subject.open_method(name, trial.selection, seed)
        self.limit = subject.cfg.max_context
        self.is_dense = len(set(self.method.dense_layers) & set(range(subject.cfg.layers))) == subject.cfg.layers
        self.seed = seed
        self._engine: Engine | None = None
        self._decoders: dict[tuple[int, ...], Decoder] = {}

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Answer]:
        """Answers in the order of the requests, none of which passes the context."""
        order = sorted(range(len(requests)), key=lambda place: (-len(requests[place].tokens), requests[place].tokens))
        ordered = [requests[place] for place in order]
        answers: list[Answer | None] = [None] * len(requests)
        found = self._score_batches(ordered) if self.is_dense else self._score_singly(ordered)
        for done, (place, answer) in enumerate(zip(order, found, strict=True), start=1):
            answers[place] = answer
            if progress is not None:
                progress(done, len(requests))
        return [answer for answer in answers if answer is not None]

    def _score_batches(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Dense passes over several sequences at once, padded on the right, where nothing is read."""
        cfg, params = self.subject.cfg, self.subject.params
        ends = unembed_params(params)
        for start in range(0, len(requests), self.batch):
            group = requests[start : start + self.batch]
            slots = min(bucket_length(len(group[0].tokens)), self.limit)
            padded = np.zeros((self.batch, slots), np.int32)
            for row, request in enumerate(group):
                padded[row, : len(request.tokens)] = request.tokens
            tokens = jnp.asarray(padded)
            x = embed_tokens(params, tokens, cfg)
            for after, _ in run_layers(params, x, forward.positions_of(x), lambda layer: Dense(), cfg):
                x = after
            for row, request in enumerate(group):
                first = request.scored_from - 1  # the query that foretells the first scored token
                width = min(_tail_width(len(request.tokens) - first), slots)
                begin = min(first, slots - width)
                piece = slice(begin, begin + width)
                log_probs, is_greedy = forward.score_next(
                    ends, x[row : row + 1, piece], tokens[row : row + 1, piece], cfg
                )
                scored = slice(first - begin, len(request.tokens) - 1 - begin)
                lengths = np.arange(request.scored_from, len(request.tokens))
                row_bytes = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * x.dtype.itemsize
                yield self._answer(request, log_probs[scored], is_greedy[scored], lengths, lengths * row_bytes)

    def _score_singly(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """One request at a time; those that begin alike share the pass over their beginning."""
        shared: tuple[tuple[int, ...], Prefilled] | None = None
        for request in requests:
            begin = min(request.sparse_from, request.scored_from - 1)
            if begin < 1 or len(request.tokens) - begin > TAIL:
                yield self._score_whole(request)
                continue
            prompt = request.tokens[:begin]
            if shared is None or shared[0] != prompt:
                shared = (prompt, self._prefill(prompt))
            yield self._score_tail(request, shared[1])

    def _score_whole(self, request: Request) -> Answer:
        length = len(request.tokens)
        sequence = forward.Sequence(np.asarray(request.tokens, np.int32), min(bucket_length(length), self.limit))
        cfg = ForwardConfig(dense_prefix=request.sparse_from)
        subject = self.subject
        passed = forward.pass_sequence(subject.params, subject.cfg, sequence, self.method, self.trial.selection, cfg)
        scored = slice(request.scored_from - 1, length - 1)
        reads = passed.tokens_read[scored], passed.bytes_read[scored]
        return self._answer(request, passed.log_probs[scored], passed.is_greedy[scored], *reads)

    def _prefill(self, prompt: tuple[int, ...]) -> Prefilled:
        """Padded, so that other prompts compile nothing; what is past this one is overwritten or never seen."""
        slots = bucket_length(len(prompt))
        padded = np.zeros(slots, np.int32)
        padded[: len(prompt)] = prompt
        room = slots + TAIL
        found = prefill(self.subject.params, self.subject.cfg, padded, room, room)
        return dataclasses.replace(found, length=len(prompt))

    def _score_tail(self, request: Request, prompt: Prefilled) -> Answer:
        tokens = np.asarray(request.tokens[prompt.length :], np.int32)
        subject, width = self.subject, _tail_width(len(tokens))
        tail = pass_tail(
            subject.params, subject.cfg, prompt, tokens, self.method, self.trial.selection, request.sparse_from, width
        )
        scored = slice(request.scored_from - 1 - prompt.length, len(tokens) - 1)
        is_greedy = tail.best[scored] == tokens[scored.start + 1 :]
        return self._answer(
            request, tail.log_probs[scored], is_greedy, tail.tokens_read[scored], tail.bytes_read[scored]
        )

    def stops(self, wanted: Wanted) -> Stops:
        """What ends a text that is written so."""
        return find_stops(self.subject.cfg, self.subject.tokenizer, wanted.stop)

    def write(self, prompts: Sequence[Sequence[int]], wanted: Wanted, progress: Progress | None = None) -> list[Text]:
        """Continue prompts that leave room in the context; texts in the order of the prompts.

        `dense` and `spotlight` go through the product's engine, in batches; other methods one by one, greedily.
        """
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        by_engine = self.method.name in ("dense", "spotlight")
        if not by_engine and wanted.sampling.temperature > 0:
            raise InputError(f"method '{self.trial.method}' generates greedily; the task asks for a temperature")
        size = self.batch if by_engine else 1
        texts: dict[int, Text] = {}
        for start in range(0, len(order), size):
            group = order[start : start + size]
            own = [prompts[place] for place in group]
            texts |= zip(
                group, self._write_batch(own, wanted) if by_engine else self._write_one(own[0], wanted), strict=True
            )
            if progress is not None:
                progress(len(texts), len(prompts))
        return [texts[place] for place in range(len(prompts))]

    def _write_batch(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> list[Text]:
        subject, selection = self.subject, self.trial.selection
        cfg = GenerateConfig(
            max_new_tokens=wanted.max_new_tokens, stop=wanted.stop, sampling=wanted.sampling, selection=selection
        )
        selector = subject.selector if self.method.name == "spotlight" else None
        assert subject.tokenizer is not None, "who gives texts has a tokenizer"
        model = BaseModel(subject.cfg, subject.params, subject.tokenizer, subject.source)
        engine = self._engine = self._engine or make_engine(model, cfg, selector)
        hash_cfg = None if selector is None else selector.cfg
        texts = []
        for found in generate(model, prompts, cfg, selector, engine):
            lengths = range(found.prompt_tokens + 1, found.prompt_tokens + len(found.tokens))
            reads = [step_reads(subject.cfg, engine.dtype, [length], hash_cfg, selection, 0) for length in lengths]
            sparse = sum(read.tokens < length for read, length in zip(reads, lengths, strict=True))
            moved = float(sum(read.bytes_keys_values + read.bytes_codes for read in reads))
            texts.append(Text(found.text, len(found.tokens), sparse, float(sum(read.tokens for read in reads)), moved))
        return texts

    def _write_one(self, prompt: Sequence[int], wanted: Wanted) -> list[Text]:
        assert self.subject.tokenizer is not None, "who gives texts has a tokenizer"
        ends = self.stops(wanted).tokens
        if ends not in self._decoders:
            self._decoders[ends] = open_decoder(
                self.subject, self.method.name, self.trial.selection, self.seed, stop_tokens=ends
            )
        written = self._decoders[ends].write(list(prompt), wanted.max_new_tokens)
        stream = TextStream(self.subject.tokenizer, wanted.stop)
        text = stream.push(list(written.tokens)) + stream.finish()
        steps = len(written.tokens) - 1
        mean_length = len(prompt) + 1 + (steps - 1) / 2
        sparse = steps if written.tokens_read < mean_length - 0.5 else 0
        return [Text(text, len(written.tokens), sparse, written.tokens_read * steps, written.bytes_read * steps)]

    def _answer(self, request: Request, log_probs, is_greedy, tokens_read, bytes_read) -> Answer:
        """Sums over the queries at scored_from - 1 ... of a request."""
        forward.check_scores(np.asarray(log_probs))
        lengths = np.arange(request.scored_from, len(request.tokens))  # what each could read
        return Answer(
            log_prob=float(np.sum(np.asarray(log_probs, np.float64))),
            is_greedy=bool(np.all(np.asarray(is_greedy))),
            sparse=int(np.sum(np.asarray(tokens_read) < lengths - 0.5)),  # means of counts, in float32
            tokens_read=float(np.sum(tokens_read)),
            bytes_read=float(np.sum(bytes_read)),
        )
