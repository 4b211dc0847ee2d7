"""Events of sequences to answers in OpenAI's format: whole, or as a stream of server-sent events."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spotlight_jax.serve.errors import ApiError
from spotlight_jax.serve.logprobs import CompletionLogprobs, TokenTexts, chat_logprobs
from spotlight_jax.serve.requests import (
    Done,
    Event,
    Failed,
    Piece,
    QueueFullError,
    Request,
    StoppingError,
    Usage,
    join_pieces,
)
from spotlight_jax.serve.requests import Send as SendEvent
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.serve.schema import Body

log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 15.0  # of silence, after which a stream gets a comment: nobody in between takes it for dead
_STATUS = {"timeout": 504, "stopping": 503, "internal": 500}


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a whole answer."""
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")  # which JSON reads as the same
    return Response(text, status, headers, "application/json")


def usage_of(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """Return what a request took.

    Args:
        usages: of its sequences, `n` for each prompt.
        n: choices; the prompt that they share counts once.
    """
    prompt, new = sum(usage.prompt_tokens for usage in usages[::n]), sum(usage.new_tokens for usage in usages)
    steps, there = sum(usage.steps for usage in usages), sum(usage.tokens_cached for usage in usages)
    read = sum(usage.tokens_read for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages[::n])},
        "spotlight": {
            "tokens_read_per_step": round(read / max(steps, 1), 1),
            "tokens_cached_per_step": round(there / max(steps, 1), 1),
            "share_read": round(read / max(there, 1), 4),
        },
    }


def error_of(failed: Failed) -> ApiError:
    """Return a failure as a client sees it; one that would only happen again is not to be tried again."""
    status = _STATUS[failed.failure]
    headers = {"retry-after": "5"} if failed.failure == "stopping" else {"x-should-retry": "false"}
    return ApiError(status, failed.message, failed.failure, headers=headers)


class Reply(Response):
    """The answer to one request; a client that goes away cancels its sequences."""

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], body: Body, is_chat: bool, texts: TokenTexts
    ) -> None:
        """Hand the sequences to the scheduler.

        Args:
            scheduler: runs them.
            requests: the sequences, in the order of choices.
            body: what the client sent.
            is_chat: of which endpoint.
            texts: of the model's tokens.

        Raises: ApiError where the queue is full, or the server is stopping.
        """
        self.scheduler, self.requests, self.asked, self.is_chat = scheduler, requests, body, is_chat
        self.created, self.background = int(time.time()), None
        self.texts, self._logprobs = texts, [CompletionLogprobs(texts) for _ in requests]
        self._loop, self._inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        try:
            self.tickets = scheduler.submit(requests, [self._mail(index) for index in range(len(requests))])
        except QueueFullError:
            seconds = str(scheduler.seconds_to_wait)
            raise ApiError(
                429, f"the queue is full; try again in {seconds} s", "queue_full", headers={"retry-after": seconds}
            ) from None
        except StoppingError:
            raise ApiError(503, "the server is stopping", "stopping", headers={"retry-after": "5"}) from None

    def _mail(self, index: int) -> SendEvent:
        """Return what the scheduler's thread puts events of a sequence into."""

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, event))

        return send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client goes away."""
        work = asyncio.create_task(
            self._stream(scope, receive, send) if self.asked.stream else self._whole(scope, receive, send)
        )
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            for ticket in self.tickets:
                if not ticket.is_over:
                    self.scheduler.cancel(ticket)
            self._log(scope["request_id"])

    def _log(self, request_id: str) -> None:
        """Log one line about the request, without what was asked or answered."""
        took = usage_of([ticket.usage for ticket in self.tickets], self.asked.n)
        first = [ticket.first_token - ticket.submitted for ticket in self.tickets if ticket.first_token is not None]
        log.info(
            "%s %s: %d prompt tokens (%d known), %d new, first after %s, %.2f s",
            request_id,
            ",".join(sorted({ticket.how for ticket in self.tickets})),
            took["prompt_tokens"],
            took["prompt_tokens_details"]["cached_tokens"],
            took["completion_tokens"],
            f"{min(first):.2f} s" if first else "-",
            self.scheduler.clock() - self.tickets[0].submitted,
        )

    async def _events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield events of all sequences until each has ended; None after a long silence."""
        left = len(self.requests)
        while left:
            try:
                index, event = await asyncio.wait_for(self._inbox.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
                continue
            left -= isinstance(event, Done | Failed)
            yield index, event

    def _head(self, is_chunk: bool) -> dict[str, Any]:
        request_id = self.requests[0].id.rpartition("-")[0]
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{request_id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.asked.model}

    def _logprobs_of(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return a piece's log-probabilities, where they are asked for."""
        if self.requests[index].logprobs is None:
            return None
        return chat_logprobs(piece, self.texts) if self.is_chat else self._logprobs[index].add(piece)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self.requests]
        reasons = ["stop"] * len(self.requests)
        async for item in self._events():
            if item is None:
                continue
            index, event = item
            if isinstance(event, Piece):
                pieces[index].append(event)
            elif isinstance(event, Done):
                reasons[index] = event.reason
            else:
                error = error_of(event)
                await json_response(error.body, error.status, error.headers)(scope, receive, send)
                return
        choices = []
        for index, reason in enumerate(reasons):
            whole = join_pieces(pieces[index])
            message = {"role": "assistant", "content": whole.text, "refusal": None}
            content = {"message": message} if self.is_chat else {"text": whole.text}
            logprobs = self._logprobs_of(index, whole)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": reason})
        usage = usage_of([ticket.usage for ticket in self.tickets], self.asked.n)
        body = {**self._head(False), "choices": choices, "usage": usage}
        await json_response(body)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})

        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        if self.is_chat:
            for index in range(len(self.requests)):
                await write(self._chunk(index, {"role": "assistant", "content": ""}, None, with_usage))
        async for item in self._events():
            if item is None:
                await write(": waiting\n\n")
                continue
            index, event = item
            if isinstance(event, Failed):
                await write(_event(error_of(event).body))
                break
            if isinstance(event, Done):
                await write(self._chunk(index, {} if self.is_chat else "", event.reason, with_usage))
            elif event.text or event.logprobs:
                delta = {"content": event.text} if self.is_chat else event.text
                await write(self._chunk(index, delta, None, with_usage, self._logprobs_of(index, event)))
        else:
            if with_usage:
                usage = usage_of([ticket.usage for ticket in self.tickets], self.asked.n)
                await write(_event({**self._head(True), "choices": [], "usage": usage}))
            await write("data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _chunk(
        self,
        index: int,
        delta: dict[str, str] | str,
        reason: str | None,
        with_usage: bool,
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        content = {"delta" if self.is_chat else "text": delta}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return _event({**self._head(True), "choices": [choice], **({"usage": None} if with_usage else {})})


def _event(body: dict[str, Any]) -> str:
    """Return a server-sent event, in ASCII: some clients take a line separator inside a text for the end of a line."""
    return f"data: {json.dumps(body)}\n\n"


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
