"""Text to token ids: what no tokenizer takes, what no model has a row for, and templates that refuse."""

import resource
import signal
import sys
import time

import numpy as np
import pytest

from spotlight_jax import token_ids
from spotlight_jax.encoding import Encoder
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import check_ids, check_text, encode_chat, encode_text, render_chat
from tests.byte_tokenizer import END, byte_tokenizer

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}


def grown_tokenizer():
    """One that got a token, id 257, which a model of 257 rows has no row for."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def encode_documents(text, vocab):
    return Encoder(grown_tokenizer(), vocab).encode([text])


@pytest.mark.parametrize("encode", [lambda text, vocab: encode_text(grown_tokenizer(), text, vocab), encode_documents])
def test_an_id_past_the_embedding_is_named_with_the_models_rows(encode):
    encode("plain", 257)
    encode("a <new> word", 258)
    with pytest.raises(InputError, match=r"token id 257 \('<new>'\), but the model's embedding has 257 rows"):
        encode("a <new> word", 257)


def test_an_end_of_text_past_the_embedding_is_refused_where_documents_get_it():
    with pytest.raises(InputError, match=rf"token id {END} \('<end>'\), but the model's embedding has 256 rows"):
        Encoder(byte_tokenizer(), 256).encode(["plain"])


@pytest.mark.parametrize(("ids", "wrong"), [([3, 300], 300), ([-1, 5], -1), (np.array([0, 2**31], np.uint32), 2**31)])
def test_given_ids_are_held_to_the_embedding_too(ids, wrong):
    with pytest.raises(InputError, match=rf"token id {wrong} is not one of the model's"):
        check_ids(ids, 300)
    check_ids([], 300)
    check_ids([0, 299], 300)


@pytest.mark.parametrize("text", ["half of a pair \ud83d", "a byte \udcff"])
def test_text_that_is_no_unicode_is_one_line_wherever_it_meets_a_tokenizer(text):
    for encode in (
        lambda: encode_text(byte_tokenizer(), text, 300),
        lambda: encode_chat(byte_tokenizer(), [{"role": "user", "content": text}], 300),
        lambda: Encoder(byte_tokenizer(), 300).encode(["fine", text]),
    ):
        with pytest.raises(InputError, match="is not valid Unicode: character"):
            encode()
    with pytest.raises(InputError, match=rf"the user's message is not valid Unicode: character {len(text) - 1} is"):
        render_chat(byte_tokenizer(), [{"role": "user", "content": text}])
    check_text("pairs that are whole \U0001f642")


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('no system role here') }}", [SYSTEM, USER], r"\(system, user\): no system role here"),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
            [USER],
            "system first",
        ),
        ("{% for message in messages %}", [USER], "template cannot write"),
        ("{{ 1 / 0 }}", [USER], "division by zero"),
        ("{{ messages[7].content }}", [USER], "template cannot write"),
        ({"tool_use": "x"}, [USER], "template cannot write"),
        (7, [USER], "template cannot write"),
    ],
)
def test_a_template_that_raises_is_one_line(template, messages, says):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        encode_chat(tokenizer, messages, 300)


def test_a_template_that_takes_the_messages_is_written_with_and_without_the_assistants_turn():
    tokenizer = byte_tokenizer()
    assert render_chat(tokenizer, [SYSTEM, USER]) == "[system]be brief[user]hi[assistant]"
    assert render_chat(tokenizer, [USER], add_generation_prompt=False) == "[user]hi"
    assert encode_chat(tokenizer, [USER], 300) == list(b"[user]hi[assistant]")


def test_a_template_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(token_ids, "TEMPLATE_SECONDS", 0.3)
    nested = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = nested
    started = time.monotonic()
    with pytest.raises(InputError, match=r"takes longer than 0.3 s"):
        token_ids.encode_chat(tokenizer, [{"role": "user", "content": "x"}], 300)
    assert time.monotonic() - started < 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


DOUBLING = (
    "{% set ns = namespace(s='x' * 64) %}{% for i in range(99) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}{{ ns.s }}"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded on Linux")
@pytest.mark.parametrize(
    "template",
    [
        DOUBLING.replace("OP", "+"),
        DOUBLING.replace("OP", "~"),
        "{{ 'x' * 9999999999 }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x' | center(9999999999) }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_a_template_that_grows_ends_in_one_line_before_memory_does(template, monkeypatch):
    monkeypatch.setattr(token_ids, "TEMPLATE_BYTES", 2**28)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"\(user\): it takes more than 0.25 GiB of memory$"):
        encode_chat(tokenizer, [USER], 300)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_template_that_writes_far_more_than_its_messages_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for i in range(11) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InputError, match=r"writes 22,000,000 characters for messages of 2,000,000$"):
        render_chat(tokenizer, [{"role": "user", "content": "x" * 2_000_000}])
    assert len(render_chat(tokenizer, [{"role": "user", "content": "x" * 90_000}])) == 990_000
