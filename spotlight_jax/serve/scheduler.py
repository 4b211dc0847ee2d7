"""Who is prefilled, who is decoded, who waits: one thread between requests and the device.

A round of the thread prefills one chunk of newcomers' prompts and then decodes one block of all running sequences, so
whoever runs waits for at most a chunk and a block, and whoever goes away is gone after a block.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.memory import tokens_read
from spotlight_jax.models.tokenizer import Tokenizer
from spotlight_jax.sampling import NOT_FINITE
from spotlight_jax.serve.prefixes import PrefixStore
from spotlight_jax.serve.requests import (
    Done,
    Event,
    Failed,
    Failure,
    Logprob,
    Piece,
    QueueFullError,
    Reason,
    Request,
    Send,
    StoppingError,
    Usage,
)
from spotlight_jax.slots import Prefill, Slots
from spotlight_jax.text_stream import TextStream

log = logging.getLogger(__name__)
MESSAGES: dict[Failure, str] = {
    "timeout": "the request took longer than it may; ask for fewer tokens",
    "stopping": "the server is stopping",
    "internal": "the server failed on this request",
}
NOT_A_NUMBER = "the model's logits are not finite for this request"


class Ticket:
    """A request on its way through the scheduler."""

    def __init__(self, request: Request, send: Send, tokenizer: Tokenizer, now: float) -> None:
        """Begin as a request that waits.

        Args:
            request: what is asked for.
            send: gets its events.
            tokenizer: of the model.
            now: on the scheduler's clock.
        """
        self.request, self.send = request, send
        self.usage = Usage(len(request.prompt))
        self.stream = TextStream(tokenizer, request.stops.strings)
        self.submitted = self.last_token = now
        self.first_token: float | None = None
        self.is_cancelled = self.is_over = False
        self.how = "running"  # or how it ended

    def push(self, tokens: Sequence[int], logprobs: Sequence[Logprob] = ()) -> Reason | None:
        """Add chosen tokens and send their text; returns why the text ends, where it does."""
        text, reason, used = "", None, []
        for token in tokens:
            used.append(token)
            self.usage.new_tokens += 1
            text += self.stream.push([token])
            reason = self._reason(token)
            if reason is not None:
                break
        if reason is not None:
            text += self.stream.finish()
        if used:
            self.send(Piece(text, tuple(used), tuple(logprobs[: len(used)])))
        return reason

    def _reason(self, token: int) -> Reason | None:
        if self.stream.is_stopped or token in self.request.stops.tokens:
            return "stop"
        return "length" if self.usage.new_tokens >= self.request.max_new_tokens else None


class Observer:
    """Receiver of what happens to requests; this one ignores all of it."""

    def first_token(self, seconds: float) -> None:
        """A request got its first token after so long."""

    def tokens(self, count: int, seconds: float) -> None:
        """A request got tokens, so long after those before."""

    def ended(self, how: str, usage: Usage) -> None:
        """A request ended: with a reason, a failure, or 'cancelled'."""


class Scheduler:
    """Requests in, events out."""

    def __init__(
        self,
        slots: Slots,
        tokenizer: Tokenizer,
        block: int,
        queue: int,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run nothing yet; see `start`.

        Args:
            slots: where sequences are decoded.
            tokenizer: of the model; used by the scheduler's thread alone.
            block: most tokens decoded at once.
            queue: most requests that wait.
            observer: receives what happens.
            clock: seconds.
        """
        self.slots, self.tokenizer, self.block, self.queue = slots, tokenizer, block, queue
        self.observer, self.clock = observer or Observer(), clock
        self.prefixes = PrefixStore(slots.pages, slots.chunk)
        self.waiting: deque[Ticket] = deque()
        self.running: dict[int, Ticket] = {}
        self.joining: tuple[Ticket, Prefill, list[bytes]] | None = None
        self.is_stopping = self.has_failed = False
        self._drain_until, self._seconds = float("inf"), 1.0
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._lengths = np.arange(slots.max_len + 1, dtype=np.int32)
        self._sums_dense = np.cumsum(self._lengths, dtype=np.int64)
        self._sums_read = functools.lru_cache(64)(self._sum_reads)
        self._sums_read(slots.engine.cfg.selection)

    # Called from any thread

    def submit(self, requests: Sequence[Request], sends: Sequence[Send]) -> list[Ticket]:
        """Let requests wait for their turn, all of them or none.

        Raises: QueueFullError; StoppingError.
        """
        now = self.clock()
        tickets = [Ticket(request, send, self.tokenizer, now) for request, send in zip(requests, sends, strict=True)]
        with self._lock:
            if self.is_stopping or self.has_failed:
                raise StoppingError
            # those that find a free slot do not wait
            free = self.slots.count - len(self.running) - (self.joining is not None)
            if len(self.waiting) + len(tickets) > self.queue + free:
                raise QueueFullError
            self.waiting.extend(tickets)
            self._lock.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Let go of a request that nobody waits for any more: it is gone after a block."""
        with self._lock:
            ticket.is_cancelled = True
            self._lock.notify_all()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that wait fail, those that run have so long to end."""
        with self._lock:
            self.is_stopping = True
            self._drain_until = min(self._drain_until, self.clock() + seconds)
            self._lock.notify_all()

    def join(self, seconds: float | None = None) -> None:
        """Wait until a drained scheduler has ended."""
        self._thread.join(seconds)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.joining)

    @property
    def seconds_to_wait(self) -> int:
        """About how long it takes until the queue has room, from 1 to 60 seconds."""
        return round(min(max(self._seconds / self.slots.count, 1.0), 60.0))

    # The thread

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    while self.is_idle and not self.is_stopping:
                        self._lock.wait()
                    if self.is_idle:
                        return
                self.round()
        except BaseException:
            log.exception("the scheduler has ended")
            self.has_failed = True
            for ticket in [*self.waiting, *self.running.values(), *([self.joining[0]] if self.joining else [])]:
                self._fail(ticket, "internal")
            raise

    def round(self) -> None:
        """Run one round: leave, prefill, decode."""
        self._drop()
        try:
            self._prefill()
        except Exception:
            log.exception("prefill failed")
            joining, self.joining = self.joining, None
            self.slots.reset_prefill()
            self.prefixes.clear()
            if joining is not None:
                self._fail(joining[0], "internal")
        if not self.running:
            return
        try:
            self._decode()
        except Exception:
            log.exception("decoding failed")
            tickets, self.running = list(self.running.values()), {}
            self.slots.reset()
            self.prefixes.clear()
            if self.joining is not None:
                tickets.append(self.joining[0])
                self.joining = None
            for ticket in tickets:
                self._fail(ticket, "internal")

    def _verdict(self, ticket: Ticket, now: float) -> Failure | None:
        """Return why a request must end now, if it must."""
        if now >= self._drain_until:
            return "stopping"
        is_late = ticket.request.deadline is not None and now >= ticket.request.deadline
        return "timeout" if is_late else None

    def _drop(self) -> None:
        """Let go of requests that nobody waits for, and of those that took too long."""
        now = self.clock()
        with self._lock:
            waiting = list(self.waiting)
            verdicts = [("stopping" if self.is_stopping else self._verdict(ticket, now)) for ticket in waiting]
            dropped = [
                (ticket, verdict)
                for ticket, verdict in zip(waiting, verdicts, strict=True)
                if verdict or ticket.is_cancelled
            ]
            for ticket, _ in dropped:
                self.waiting.remove(ticket)
        if self.joining is not None:
            ticket = self.joining[0]
            verdict = self._verdict(ticket, now)
            if verdict or ticket.is_cancelled:
                self.joining = None
                dropped.append((ticket, verdict))
        freed = []
        for slot, ticket in list(self.running.items()):
            verdict = self._verdict(ticket, now)
            if verdict or ticket.is_cancelled:
                del self.running[slot]
                freed.append(slot)
                dropped.append((ticket, verdict))
        if freed:
            self.slots.free(freed)
        for ticket, verdict in dropped:
            if ticket.is_cancelled:
                self._end(ticket, "cancelled")
            else:
                assert verdict is not None
                self._fail(ticket, verdict)

    def _prefill(self) -> None:
        """Prefill up to a chunk of tokens, of one newcomer or of several with short prompts."""
        left = self.slots.chunk
        while left > 0 and (self.joining is not None or self._welcome()):
            assert self.joining is not None
            ticket, prefill, hashes = self.joining
            size = self.slots.next_size(prefill)
            if size > left:
                return
            left -= size
            if self.slots.advance(prefill):
                page = self.prefixes.claim(hashes, prefill.done // self.slots.chunk - 1) if hashes else None
                if page is not None:
                    self.slots.keep(prefill, page)
            if not prefill.is_whole:
                continue
            slot = next(slot for slot in range(self.slots.count) if slot not in self.running)
            token = self.slots.finish(prefill, slot)
            self.joining = None
            self._give(ticket, slot, [token], 0, self._logprobs_of(ticket, 0, 1))

    def _welcome(self) -> bool:
        """Begin with the next newcomer, where there is one and a slot for it."""
        with self._lock:
            if not self.waiting or len(self.running) >= self.slots.count:
                return False
            ticket = self.waiting.popleft()
        request = ticket.request
        try:
            kind = self.slots.kind_of(len(request.prompt) + request.max_new_tokens)
            hashes = self.prefixes.hashes(request.prompt, kind) if self.slots.pages else []
            pages = self.prefixes.find(hashes, len(request.prompt))
            selection, has_logprobs = self._selection_of(request), request.logprobs is not None
            args = request.prompt, request.max_new_tokens, request.row, selection, has_logprobs, pages
            prefill = self.slots.begin(*args)
        except Exception:
            self._fail(ticket, "internal")
            raise
        ticket.usage.cached_tokens = prefill.done
        self.joining = ticket, prefill, hashes
        return True

    def _decode(self) -> None:
        before = self.slots.lengths
        tokens = self.slots.decode(self.block)
        taken = self.slots.lengths - before
        for slot, ticket in list(self.running.items()):
            logprobs = self._logprobs_of(ticket, slot, int(taken[slot]))
            self._give(ticket, slot, tokens[slot, : taken[slot]].tolist(), int(before[slot]), logprobs)
        ended = [slot for slot in np.flatnonzero(self.slots.lengths).tolist() if slot not in self.running]
        if ended:
            self.slots.free(ended)

    def _selection_of(self, request: Request) -> SelectionConfig:
        return self.slots.engine.cfg.selection if request.selection is None else request.selection

    def _sum_reads(self, selection: SelectionConfig) -> np.ndarray:
        """Return the tokens that the steps up to each length read together."""
        reads = tokens_read(self._lengths, selection, self.slots.engine.has_tail)
        is_sparse = self._lengths >= self.slots.sparse_from(selection)
        return np.cumsum(np.where(is_sparse, reads, self._lengths), dtype=np.int64)

    def _logprobs_of(self, ticket: Ticket, row: int, count: int) -> list[Logprob]:
        """Return log-probabilities of a request's newest tokens, `count` of them, where it asks for them."""
        found, most = self.slots.logprobs, ticket.request.logprobs
        if found is None or most is None:
            return []
        chosen, top, ids = (
            np.reshape(part[row], (-1, *part.shape[part.ndim - tail :]))[:count].tolist()
            for part, tail in ((found.chosen, 0), (found.top, 1), (found.top_tokens, 1))
        )
        return [
            Logprob(one, tuple(zip(ids[place][:most], top[place][:most], strict=True)))
            for place, one in enumerate(chosen)
        ]

    def _give(self, ticket: Ticket, slot: int, tokens: list[int], before: int, logprobs: list[Logprob]) -> None:
        """Hand a request its new tokens, and end it where they end it.

        Args:
            before: tokens cached before these; 0: the tokens are the first one, which a prompt gives.
            logprobs: of the tokens, where they are asked for.
        """
        self.running[slot] = ticket
        is_finite = NOT_FINITE not in tokens
        tokens = [token for token in tokens if token != NOT_FINITE]
        now, usage = self.clock(), ticket.usage
        if ticket.first_token is None:
            ticket.first_token = now
            self.observer.first_token(now - ticket.submitted)
        else:
            self.observer.tokens(len(tokens), now - ticket.last_token)
        ticket.last_token = now
        if before:
            sums, end = self._sums_read(self._selection_of(ticket.request)), before + len(tokens)
            usage.steps += len(tokens)
            usage.tokens_read += int(sums[end] - sums[before])
            usage.tokens_cached += int(self._sums_dense[end] - self._sums_dense[before])
        try:
            reason = ticket.push(tokens, logprobs)
        except Exception:  # of the tokenizer: it is about this text alone
            log.exception("request %s: its tokens are no text", ticket.request.id)
            del self.running[slot]
            self._fail(ticket, "internal")
            return
        if reason is not None or not is_finite:
            del self.running[slot]
        if reason is not None:
            self._end(ticket, reason, Done(reason, usage))
        elif not is_finite:
            self._fail(ticket, "internal", NOT_A_NUMBER)

    def _fail(self, ticket: Ticket, failure: Failure, message: str | None = None) -> None:
        self._end(ticket, failure, Failed(failure, message or MESSAGES[failure]))

    def _end(self, ticket: Ticket, how: str, event: Event | None = None) -> None:
        ticket.is_over, ticket.how = True, how
        # of the last ones, for who asks how long the queue is
        self._seconds += 0.1 * (self.clock() - ticket.submitted - self._seconds)
        self.observer.ended(how, ticket.usage)
        if event is not None:
            ticket.send(event)
