"""Bodies to sequences: text to token ids, fields to settings, lengths checked against the context."""

import asyncio
import copy
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from spotlight_jax.config.generation import RowConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.serve.budgets import check_budget, selection_of
from spotlight_jax.serve.errors import ApiError
from spotlight_jax.serve.logprobs import TokenTexts
from spotlight_jax.serve.requests import Request
from spotlight_jax.serve.schema import ChatBody, CompletionBody
from spotlight_jax.slots import Slots
from spotlight_jax.stops import find_stops
from spotlight_jax.token_ids import check_ids, encode_chat, encode_text

Result = TypeVar("Result")


class Translator:
    """Translation of bodies into sequences for one model."""

    def __init__(self, tokenizer: Any, slots: Slots, name: str, seconds: float, selector: str | None) -> None:
        """Take a tokenizer of its own, which one thread uses.

        Args:
            tokenizer: of the model.
            slots: where sequences are decoded.
            name: what clients call the model.
            seconds: that a request may take.
            selector: what is read by; None: every token is.
        """
        self.tokenizer, self.slots, self.model_cfg = copy.deepcopy(tokenizer), slots, slots.engine.model_cfg
        self.name, self.context, self.seconds, self.selector = name, slots.context, seconds, selector
        self.texts = TokenTexts(tokenizer, self.model_cfg.vocab)
        self.started = int(time.time())
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    def model_card(self) -> dict[str, Any]:
        """Return the model as `/v1/models` lists it."""
        own = {"max_model_len": self.context, "selector": self.selector}
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "spotlight-jax", **own}

    def check_model(self, name: str) -> None:
        """Raise ApiError where a client asks for another model."""
        if name != self.name:
            shown = name[:200].encode("utf-8", "backslashreplace").decode()
            raise ApiError(
                404, f"there is no model '{shown}'; this server has '{self.name}'", "model_not_found", "model"
            )

    async def _encode(self, run: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, *args)

    async def chat_prompt(self, body: ChatBody) -> list[int]:
        """Encode a conversation by the model's template; raises InputError as `encode_chat`."""
        self.check_model(body.model)
        roles = {"developer": "system"}
        messages = [{"role": roles.get(one.role, one.role), "content": one.text} for one in body.messages]
        return await self._encode(encode_chat, self.tokenizer, messages, self.model_cfg.vocab)

    async def prompts(self, body: CompletionBody) -> list[list[int]]:
        """Encode each prompt; raises InputError as `encode_text`, and for ids that are none."""
        self.check_model(body.model)
        encoded = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                ids = await self._encode(encode_text, self.tokenizer, prompt, self.model_cfg.vocab)
            else:
                ids = prompt
                check_ids(ids, self.model_cfg.vocab)
            encoded.append(ids)
        return encoded

    def requests(
        self, body: ChatBody | CompletionBody, prompts: list[list[int]], request_id: str, now: float
    ) -> list[Request]:
        """Return a sequence for each choice of each prompt; raises ApiError for what can never fit.

        Args:
            body: what the client sent.
            prompts: token ids.
            request_id: of the client's request.
            now: on the scheduler's clock.
        """
        stops = find_stops(self.model_cfg, self.tokenizer, body.stops)
        if stops.unmatched:
            raise ApiError(400, stops.unmatched[0], "invalid_value", "stop")
        sampling, selection = _sampling(body), self._selection(body)
        requests: list[Request] = []
        for prompt in prompts:
            limit = self._limit(body, len(prompt))
            if selection is not None:
                ends = len(prompt), len(prompt) + limit
                check_budget(selection, self.slots.engine.cfg.selection, *ends, self.slots.sparse_from)
            for number in range(body.n):
                row = RowConfig(sampling, stops.tokens, number)
                requests.append(
                    Request(
                        id=f"{request_id}-{len(requests)}",
                        prompt=tuple(prompt),
                        max_new_tokens=limit,
                        row=row,
                        stops=stops,
                        selection=selection,
                        logprobs=body.most_logprobs,
                        deadline=now + self.seconds,
                    )
                )
        return requests

    def _selection(self, body: ChatBody | CompletionBody) -> SelectionConfig | None:
        """Return how much a request's steps read, where it says so."""
        if self.slots.has_selector:
            return selection_of(body, self.slots.engine.cfg.selection)
        for name in ("keep", "budget"):
            if getattr(body, name) is not None:
                message = f"'{name}' needs a selector, and this server has none: every token is read"
                raise ApiError(400, message, "unsupported_parameter", name)
        return None

    def _limit(self, body: ChatBody | CompletionBody, tokens: int) -> int:
        """Return the most tokens that follow a prompt of so many."""
        if tokens == 0:
            raise ApiError(400, "the prompt is empty; give at least one token of text", "invalid_value", "prompt")
        limit = max(self.context - tokens, 1) if body.limit is None else body.limit
        if tokens + limit > self.context:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens and {limit} may follow, together {tokens + limit}; a request of this "
                f"server can have at most {self.context}",
                "context_length_exceeded",
                "messages" if isinstance(body, ChatBody) else "prompt",
            )
        return limit


def _sampling(body: ChatBody | CompletionBody) -> SamplingConfig:
    """Return how tokens are drawn; raises InputError for numbers that mean nothing."""
    seed = secrets.randbits(32) if body.seed is None else body.seed
    if body.temperature == 0:  # nothing is drawn
        return SamplingConfig(seed=seed)
    return SamplingConfig(float(body.temperature), body.top_k, float(body.top_p), seed)
