"""Log-probabilities by OpenAI's client, against a dense forward pass over prompt and answer."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import openai
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models

from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.models.runner import forward
from spotlight_jax.serve.logprobs import CompletionLogprobs, TokenTexts, chat_logprobs
from spotlight_jax.serve.requests import Logprob, Piece
from tests.byte_tokenizer import END, byte_tokenizer
from tests.serve.running import serving
from tests.serve.test_openai import TALK, rendered
from tests.serve.test_scheduler import alone
from tests.serve.world import MODEL, draw_request, make_engine

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def client():
    with serving() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@functools.cache
def reference(ids, length=300):
    """Log-softmax of the logits after each token, float32[tokens, vocab]; padded, so that one program serves all."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    logits = forward(make_engine(True).params, jnp.asarray(padded), MODEL)[0, : len(ids)]
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def chosen_by(prompt, new, temperature, **sampling):
    """The tokens that the engine alone draws after a prompt, read densely."""
    cfg = SamplingConfig(temperature, seed=3, **sampling) if temperature else SamplingConfig()
    one = draw_request(1)
    row = dataclasses.replace(one.row, sampling=cfg, number=0)
    return alone(dataclasses.replace(one, prompt=tuple(prompt), max_new_tokens=new, row=row), False)


def bytes_of(token):
    """Of the byte tokenizer; the model has more rows than it has tokens."""
    return b"<end>" if token == END else bytes([token]) if token < END else b""


def name_of(token):
    raw = bytes_of(token)
    return raw.decode() if raw.isascii() else f"bytes:\\x{token:02x}"


def check_content(content, prompt, tokens, top):
    """Each entry of a chat's `content` against the reference."""
    known = reference((*prompt, *tokens))[len(prompt) - 1 : -1]
    for entry, token, logprobs in zip(content, tokens, known, strict=True):
        assert bytes(entry.bytes) == bytes_of(token)
        assert entry.token == bytes_of(token).decode("utf-8", "backslashreplace")
        assert abs(entry.logprob - logprobs[token]) < TOLERANCE
        best = np.argsort(-logprobs)[:top]
        np.testing.assert_allclose([one.logprob for one in entry.top_logprobs], logprobs[best], atol=TOLERANCE)
        assert {bytes(one.bytes) for one in entry.top_logprobs} == {bytes_of(one) for one in best}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_chats_log_probabilities_are_those_of_the_models_own_softmax(client, temperature):
    """Whatever it is drawn at: before temperature and top-p, as the model gives them."""
    options = {"model": "tiny", "messages": TALK, "max_tokens": 12, "seed": 3, "temperature": temperature}
    options |= {"top_p": 0.9, "logprobs": True, "top_logprobs": 20, "extra_body": {"dense": True}}
    reply = client.chat.completions.create(**options)
    content = reply.choices[0].logprobs.content
    tokens, text = chosen_by(rendered(TALK), 12, temperature, top_p=0.9)
    assert len(content) == reply.usage.completion_tokens > 2
    check_content(content, rendered(TALK), tokens, 20)
    stream = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **options)]
    assert [entry for choice in stream if choice.logprobs for entry in choice.logprobs.content] == content
    assert "".join(choice.delta.content or "" for choice in stream) == text == reply.choices[0].message.content


def test_without_top_logprobs_there_are_the_chosen_tokens_alone(client):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 5, "temperature": 0, "logprobs": True}
    content = client.chat.completions.create(extra_body={"dense": True}, **options).choices[0].logprobs.content
    check_content(content, rendered(TALK), chosen_by(rendered(TALK), 5, 0)[0], 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_log_probabilities_have_offsets_and_the_chosen_token_among_the_best(client, stream):
    prompt = byte_tokenizer()("Once upon a time").input_ids
    reply = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=14, temperature=1.3, seed=3, logprobs=2, stream=stream,
        extra_body={"dense": True},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    names, chosen, offsets, top = (
        [one for part in parts for one in getattr(part, field)]
        for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    )
    tokens, _ = chosen_by(prompt, 14, 1.3)
    known = reference((*prompt, *tokens))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(chosen, known[np.arange(len(tokens)), tokens], atol=TOLERANCE)
    for name, token, logprob, best, logprobs in zip(names, tokens, chosen, top, known, strict=True):
        assert name == name_of(token) and best[name] == logprob
        wanted = {name_of(one): logprobs[one] for one in (*np.argsort(-logprobs)[:2], token)}
        assert best == pytest.approx(wanted, abs=TOLERANCE)
    assert len(tokens) > 2 and offsets[0] == 0 and offsets == sorted(offsets)


def test_those_who_do_not_ask_get_the_same_tokens_beside_those_who_do(client):
    options = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "temperature": 0}
    asked, plain = (client.completions.create(logprobs=most, **options).choices[0] for most in (3, None))
    assert asked.text == plain.text and plain.logprobs is None


# Formats


def pieces_of(tokens, top=()):
    return Piece("", tuple(tokens), tuple(Logprob(-0.5, top) for _ in tokens))


def test_half_characters_are_written_as_bytes():
    texts = TokenTexts(byte_tokenizer(), 300)
    entries = chat_logprobs(pieces_of([*"é".encode(), 65, END]), texts)["content"]
    assert [entry["token"] for entry in entries] == ["\\xc3", "\\xa9", "A", "<end>"]
    assert [entry["bytes"] for entry in entries] == [[0xC3], [0xA9], [65], list(b"<end>")]
    part = CompletionLogprobs(texts).add(pieces_of([65, *"é".encode(), END, 66]))
    assert part["tokens"] == ["A", "bytes:\\xc3", "bytes:\\xa9", "<end>", "B"]
    assert part["text_offset"] == [0, 1, 1, 2, 2]
    assert texts.bytes[299] == b""


def test_what_is_impossible_is_a_number_of_json():
    piece = Piece("", (65,), (Logprob(-math.inf, ((66, -math.inf),)),))
    (entry,) = chat_logprobs(piece, TokenTexts(byte_tokenizer(), 300))["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_tokenizers_with_spaces_as_blocks_and_single_bytes_are_read():
    vocab = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "x\u2581": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    texts = TokenTexts(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 5)
    assert texts.bytes == [b"<unk>", b" the", b"\xe2", b"x ", b""]
