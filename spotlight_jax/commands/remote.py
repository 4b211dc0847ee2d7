"""A conversation in the terminal with a model that a server runs."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import requests
from rich.console import Console

from spotlight_jax.commands.chat import ChatCommandConfig
from spotlight_jax.commands.terminal import HELP, prepare_lines, read_line, write_text
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import check_text

KEY_VARIABLE = "SPOTLIGHT_API_KEY"
SECONDS = 10.0  # to reach the server; an answer may take as long as it takes
_NO_SERVER = "no server of OpenAI's API answers there; give the address that `spotlight serve` shows"


class Server:
    """A server of OpenAI's API, and the model it has."""

    def __init__(self, url: str, model: str | None) -> None:
        """Ask the server for its model; raises InputError where it does not answer.

        Args:
            url: of the server, with or without /v1.
            model: which to use; None: its first.
        """
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        key = os.environ.get(KEY_VARIABLE)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        listed = self._ask("GET", "/models").json()
        try:
            self.model = model or str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise InputError(f"{url}: {_NO_SERVER}") from None

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Return an answer; raises InputError with the server's own words where it is an error."""
        try:
            reply = requests.request(
                method, self.url + path, headers=self.headers, timeout=(SECONDS, None), stream=True, **options
            )
            if reply.ok:
                return reply
            message = reply.json()["error"]["message"]
        except requests.JSONDecodeError:
            message = f"status {reply.status_code}; {_NO_SERVER}"
        except (requests.RequestException, KeyError, TypeError) as error:
            message = f"{_NO_SERVER} ({type(error).__name__})"
        hint = f"; set {KEY_VARIABLE}" if "API key" in message else ""
        raise InputError(f"{self.url}: {message}{hint}")

    def stream(self, messages: list[dict[str, str]], cfg: ChatCommandConfig) -> Iterator[dict[str, Any]]:
        """Yield the events of an answer."""
        own = cfg.generation
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "max_completion_tokens": own.max_new_tokens}
        body |= {"temperature": own.sampling.temperature, "stop": list(own.stop) or None}
        if own.sampling.temperature > 0:
            body |= {"top_p": own.sampling.top_p, "top_k": own.sampling.top_k or None, "seed": own.sampling.seed}
        with self._ask("POST", "/chat/completions", json={k: v for k, v in body.items() if v is not None}) as reply:
            for line in reply.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise InputError(str(event["error"]["message"]))
                    yield event


def main(cfg: ChatCommandConfig, read: Callable[[str], str] = input) -> list[dict[str, str]]:
    """Talk until the input ends; returns the messages."""
    assert cfg.url is not None
    notes = Console(stderr=True, highlight=False, style="dim")
    server = Server(cfg.url, cfg.model)
    notes.print(f"{server.model} at {server.url}", markup=False, soft_wrap=True)
    prepare_lines()
    notes.print(HELP, markup=False, soft_wrap=True)
    first = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(first)
    while (text := read_line(read, notes)) is not None:
        if text == "/new":
            messages = list(first)
        elif text == "/help":
            notes.print(HELP, markup=False, soft_wrap=True)
        elif text:
            messages = _answer(server, [*messages, {"role": "user", "content": text}], cfg, notes)
    return messages


def _answer(
    server: Server, messages: list[dict[str, str]], cfg: ChatCommandConfig, notes: Console
) -> list[dict[str, str]]:
    """Show an answer; returns the conversation with it, or as it was before where there is none."""
    text, reason, usage = "", None, None
    try:
        check_text(messages[-1]["content"])
        for event in server.stream(messages, cfg):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                text += piece
                write_text(piece)
        write_text("\n")
    except KeyboardInterrupt:
        write_text(" ...\n")
    except (InputError, requests.RequestException) as error:
        write_text("\n" if text else "")
        notes.print(
            str(error) if isinstance(error, InputError) else "the server went away", markup=False, soft_wrap=True
        )
        return messages[:-1]
    if reason == "length":
        notes.print(
            f"the answer ends at --max-new-tokens {cfg.generation.max_new_tokens}", markup=False, soft_wrap=True
        )
    if cfg.report and usage:
        notes.print(_describe(usage), markup=False, soft_wrap=True)
    return [*messages, {"role": "assistant", "content": text}]


def _describe(usage: dict[str, Any]) -> str:
    """Return a line of a server's usage."""
    known = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    line = f"{usage['prompt_tokens']} prompt tokens ({known} known before), {usage['completion_tokens']} new"
    read = usage.get("spotlight")
    return line + (f", {read['share_read']:.1%} of the cache read" if read else "")
