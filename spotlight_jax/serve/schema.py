"""What a client may ask for: every field is used, or refused by name."""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import pydantic
from pydantic import Field

from spotlight_jax.config.selection import LONGEST
from spotlight_jax.errors import InputError
from spotlight_jax.serve.errors import ApiError
from spotlight_jax.token_ids import check_text

MOST_CHOICES = 16
MOST_STOP_STRINGS = 16
MOST_CHAT_LOGPROBS, MOST_COMPLETION_LOGPROBS = 20, 5  # OpenAI's
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

# Fields of OpenAI's API that do nothing at these values, and are refused at any other; null is always the same as none.
_OFF: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "parallel_tool_calls": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
}


class Strict(pydantic.BaseModel):
    """Nothing is guessed: a number in quotes is no number, and an unknown field an error."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Body(Strict):
    """Fields of both endpoints."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOP_STRINGS)] = Field(default_factory=list)
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    dense: bool = False
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    budget: Annotated[int, Field(ge=1, le=LONGEST)] | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatBody(Body):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_CHAT_LOGPROBS)] | None = None

    @property
    def most_logprobs(self) -> int | None:
        """Number of most probable tokens to return for each token; None: not even the chosen one's probability."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


class CompletionBody(Body):
    """`/v1/completions`."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    )

    logprobs: Annotated[int, Field(ge=0, le=MOST_COMPLETION_LOGPROBS)] | None = None

    @property
    def most_logprobs(self) -> int | None:
        """Number of most probable tokens to return for each token; None: not even the chosen one's probability."""
        return self.logprobs

    @property
    def limit(self) -> int:
        """Most tokens of each text."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


AnyBody = TypeVar("AnyBody", bound=Body)


def read_json(raw: bytes) -> dict[str, Any]:
    """Return the object that a body holds; raises ApiError where it holds none."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", "invalid_json") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not valid UTF-8", "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {_short(str(error))}", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object", "invalid_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_body(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """Return a checked body; raises ApiError that names the first field that cannot be used."""
    body = {name: value for name, value in read_json(raw).items() if value is not None}
    for name in [name for name in body if name not in kind.model_fields]:
        _check_off(name, body.pop(name))
    try:
        parsed = kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _explain(error) from None
    _check_together(parsed)
    return parsed


def _check_off(name: str, value: Any) -> None:
    """Refuse a field that would do something, or that nobody knows."""
    shown = _short(name)
    if name not in _OFF:
        raise ApiError(400, f"there is no field '{shown}'", "unknown_parameter", shown)
    is_off = any(type(value) is type(off) or not isinstance(value, bool) for off in _OFF[name]) and value in _OFF[name]
    if not is_off:
        raise ApiError(400, f"'{shown}' is not supported by this server", "unsupported_parameter", shown)


def _check_together(body: Body) -> None:
    """Refuse fields that contradict each other, and text that is none."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is about streams; set stream=true", "invalid_value", "stream_options")
    if "" in body.stops:
        raise ApiError(400, "a stop string is empty, which every text holds", "invalid_value", "stop")
    if isinstance(body, ChatBody) and None not in (body.max_tokens, body.max_completion_tokens):
        raise ApiError(
            400, "give 'max_tokens' or 'max_completion_tokens', not both", "invalid_value", "max_completion_tokens"
        )
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' needs logprobs=true", "invalid_value", "top_logprobs")
    given = [name for name in ("keep", "budget", "dense") if getattr(body, name)]
    if len(given) > 1:
        raise ApiError(400, f"give '{given[0]}' or '{given[1]}', not both", "invalid_value", given[1])
    try:
        for text in body.stops:
            check_text(text, "a stop string")
    except InputError as error:
        raise ApiError(400, str(error), "invalid_value", "stop") from None


def _explain(error: pydantic.ValidationError) -> ApiError:
    """Return the first of pydantic's errors as one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[", "str", "int"))]
    where = _short(".".join(path)) or "body"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"'{where}': {_short(first['msg'])}", code, where)


def _short(text: str) -> str:
    """Return a client's text cut short, with nothing in it that UTF-8 cannot hold."""
    return text[:200].encode("utf-8", "backslashreplace").decode("utf-8")
