"""The HTTP side: OpenAI's endpoints, health, metrics and the page."""

import asyncio
import dataclasses
import functools
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spotlight_jax.errors import InputError
from spotlight_jax.serve.errors import ApiError
from spotlight_jax.serve.metrics import Metrics
from spotlight_jax.serve.replies import Reply, json_response
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.serve.schema import ChatBody, CompletionBody, read_body
from spotlight_jax.serve.translate import Translator

log = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # need no key
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONTENT_SECURITY = (  # the page loads nothing and talks to nobody else
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on the body of a request."""

    body_bytes: int
    body_seconds: float


class Service:
    """Endpoints over one scheduler."""

    def __init__(
        self, scheduler: Scheduler, translator: Translator, metrics: Metrics, limits: Limits, logs_prompts: bool = False
    ) -> None:
        """Hold references.

        Args:
            scheduler: runs requests.
            translator: makes requests of bodies.
            metrics: of the scheduler.
            limits: of bodies.
            logs_prompts: whether the log holds token ids of prompts.
        """
        self.scheduler, self.translator, self.metrics, self.limits = scheduler, translator, metrics, limits
        self.logs_prompts = logs_prompts

    async def chat(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        body = read_body(await self._read(request), ChatBody)
        prompts = [await self.translator.chat_prompt(body)]
        return self._run(request, body, prompts, True)

    async def complete(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        body = read_body(await self._read(request), CompletionBody)
        return self._run(request, body, await self.translator.prompts(body), False)

    def _run(
        self, request: Request, body: ChatBody | CompletionBody, prompts: list[list[int]], is_chat: bool
    ) -> Response:
        if self.logs_prompts:
            log.info("%s prompts: %s", request.scope["request_id"], prompts)
        sequences = self.translator.requests(body, prompts, request.scope["request_id"], self.scheduler.clock())
        return Reply(self.scheduler, sequences, body, is_chat, self.translator.texts)

    async def _read(self, request: Request) -> bytes:
        """Read the body, within its limits."""
        limit = self.limits.body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send unasked
            raise ApiError(415, "the body must have the content type application/json", "invalid_content_type")
        too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            message = f"the body took longer than {self.limits.body_seconds:g} s"
            raise ApiError(408, message, "body_too_slow", headers={"connection": "close"}) from None
        return b"".join(parts)

    async def models(self, request: Request) -> Response:
        """Answer `/v1/models`."""
        return json_response({"object": "list", "data": [self.translator.model_card()]})

    async def model(self, request: Request) -> Response:
        """Answer `/v1/models/NAME`."""
        self.translator.check_model(request.path_params["name"])
        return json_response(self.translator.model_card())

    async def health(self, request: Request) -> Response:
        """Answer whether the server works at all."""
        if self.scheduler.has_failed:
            raise ApiError(503, "the scheduler has ended; restart the server", "failed")
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer whether the server takes requests."""
        if self.scheduler.has_failed or self.scheduler.is_stopping:
            raise ApiError(503, "the server takes no requests", "stopping")
        return json_response({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        """Answer with counts in Prometheus' text format."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """Answer with the chat page."""
        text = resources.files("spotlight_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _CONTENT_SECURITY})


def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Give every error of an endpoint OpenAI's format; a bug's traceback goes to the log alone."""

    @functools.wraps(endpoint)
    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            return json_response(error.body, error.status, error.headers)
        except InputError as error:
            return json_response(ApiError(400, str(error), "invalid_value").body, 400)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except Exception:
            log.exception("request %s failed", request.scope.get("request_id"))
            return json_response(ApiError(500, "the server failed on this request", "internal_error").body, 500)

    return run


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path", 405: "this path does not take that method"}.get(
        error.status_code, error.detail
    )
    refused = ApiError(error.status_code, message, "not_found" if error.status_code == 404 else None)
    return json_response(refused.body, error.status_code, dict(error.headers or {}))


class Gate:
    """Middleware that gives every request an id, and checks its key where the server has one."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        """Stand before an app.

        Args:
            app: what is let through to.
            api_key: what clients must give; None: nothing.
        """
        self.app = app
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        scope["request_id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"x-request-id", scope["request_id"].encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._is_allowed(headers.get(b"authorization", "")):
            error = ApiError(
                401, "the API key is missing or wrong", "invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
            await json_response(error.body, 401, error.headers)(scope, receive, send_with_id)
            return
        await self.app(scope, receive, send_with_id)

    def _is_allowed(self, authorization: str) -> bool:
        """Whether the key is right; takes the same time wherever a wrong one differs."""
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        return hmac.compare_digest(digest, self._key) and scheme.lower() == "bearer"


def make_app(service: Service, api_key: str | None = None) -> ASGIApp:
    """Make the server's ASGI app."""
    routes = [
        Route(path, guarded(endpoint), methods=[method])
        for path, endpoint, method in (
            ("/v1/chat/completions", service.chat, "POST"),
            ("/v1/completions", service.complete, "POST"),
            ("/v1/models", service.models, "GET"),
            ("/v1/models/{name:path}", service.model, "GET"),
            ("/health", service.health, "GET"),
            ("/ready", service.ready, "GET"),
            ("/metrics", service.show_metrics, "GET"),
            ("/", service.page, "GET"),
        )
    ]
    return Gate(Starlette(routes=routes, exception_handlers={HTTPException: _refuse}), api_key)
