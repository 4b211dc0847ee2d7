"""Text to token ids: the one place where a text meets a tokenizer, and its ids meet the rows of a model's embedding.

A tokenizer may hold more tokens than the model has rows (one that was extended after the model was trained), and text
may be what no tokenizer takes. Both end here in one line, before anything runs.
"""

import contextlib
import pathlib
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spotlight_jax.errors import InputError

TEMPLATE_SECONDS = 10.0  # a chat template is a program, and may never end
TEMPLATE_BYTES = 2**30  # that it may take while it runs
_REPEATS, _OWN_CHARACTERS = 10, 1_000_000  # what it may write: its messages so often, and so much of its own
Messages = Sequence[dict[str, str]]


def encode_text(tokenizer: Any, text: str, vocab: int, special: bool = True) -> list[int]:
    """Encode a text; raises InputError where it is not valid Unicode or gives ids that the model has no row for.

    Args:
        tokenizer: of transformers.
        text: any text.
        vocab: rows of the model's embedding.
        special: whether the tokenizer adds what it puts around every text.
    """
    check_text(text)
    try:
        ids = list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
    except Exception as error:  # one whose files name tokens that its vocabulary lacks, for example
        raise InputError(f"the model's tokenizer cannot encode this text: {error or type(error).__name__}") from error
    check_ids(ids, vocab, tokenizer)
    return ids


def encode_chat(tokenizer: Any, messages: Messages, vocab: int) -> list[int]:
    """Encode a conversation by the model's chat template, ready for the assistant's answer.

    Raises InputError as `encode_text` and `render_chat` do.
    """
    return encode_text(tokenizer, render_chat(tokenizer, messages), vocab, special=False)


def render_chat(tokenizer: Any, messages: Messages, add_generation_prompt: bool = True, **options: Any) -> str:
    """Write a conversation by the model's chat template; raises InputError where there is none, or it refuses.

    Args:
        tokenizer: of the model.
        messages: what was said, each with its role and content.
        add_generation_prompt: whether the assistant is to answer.
        **options: of transformers' `apply_chat_template`.
    """
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template; use generate with a plain prompt")
    for message in messages:
        check_text(message["content"], f"the {message['role']}'s message")
    try:
        with _bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **options
            )
    except Exception as error:  # a template is a program, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        reason = str(error).strip() or type(error).__name__
        raise InputError(f"the model's chat template cannot write these messages ({roles}): {reason}") from error
    if not isinstance(text, str):
        raise InputError(f"the model's chat template writes {type(text).__name__} instead of a text")
    given = sum(len(message["content"]) for message in messages)
    if len(text) > _REPEATS * given + _OWN_CHARACTERS:
        raise InputError(f"the model's chat template writes {len(text):,} characters for messages of {given:,}")
    return text


@contextlib.contextmanager
def _bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer, and MemoryError where it takes more bytes.

    Outside the main thread, which alone gets signals, neither is raised; of memory it is on Linux alone.
    """

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _bounded_memory(memory):
            yield
    except MemoryError:
        raise MemoryError(f"it takes more than {memory / 2**30:g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _bounded_memory(most: int) -> Iterator[None]:
    """Let the process take so many more bytes of address space and no more, on Linux."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + most
    limits = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_text(text: str, name: str = "the text") -> None:
    """Raise InputError where a text holds surrogates: halves of a character, or bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not valid Unicode: character {error.start} is {text[error.start]!r} (a byte that is not UTF-8, "
            "or half of a surrogate pair); convert it to UTF-8"
        ) from None


def check_ids(ids: Sequence[int] | np.ndarray, vocab: int, tokenizer: Any = None) -> None:
    """Raise InputError naming a token id that is none of the model's 0 to `vocab` - 1.

    Args:
        ids: of one text.
        vocab: rows of the model's embedding.
        tokenizer: which made the ids, if one did.
    """
    if len(ids) == 0:
        return
    low, high = int(min(ids) if isinstance(ids, list) else np.min(ids)), int(np.max(ids))
    if low >= 0 and high < vocab:
        return
    wrong = low if low < 0 else high
    rows = f"the model's embedding has {vocab} rows"
    if tokenizer is None:
        raise InputError(f"token id {wrong} is not one of the model's: {rows}; use ids from 0 to {vocab - 1}")
    token = tokenizer.convert_ids_to_tokens(wrong) if hasattr(tokenizer, "convert_ids_to_tokens") else "?"
    raise InputError(
        f"the tokenizer gives token id {wrong} ({token!r}), but {rows}: the tokenizer is not this model's, or was "
        "extended after the model was trained; use the model's own tokenizer"
    )
