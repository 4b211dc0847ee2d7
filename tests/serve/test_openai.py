"""OpenAI's own client against both endpoints, streaming and whole, sync and async."""

import asyncio
import dataclasses
import json

import numpy as np
import openai
import pytest

from tests.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.serve.running import serving
from tests.serve.test_scheduler import alone
from tests.serve.world import draw_request

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo 🌍"}]


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def rendered(talk):
    text = "".join(f"[{one['role']}]{one['content']}" for one in talk) + "[assistant]"
    assert "add_generation_prompt" in TEMPLATE
    return byte_tokenizer()(text).input_ids


def wanted(tokens, new, seed=1, **fields):
    """What the engine alone gives after these tokens, read sparsely; greedy with an odd seed of `draw_request`."""
    request = dataclasses.replace(draw_request(seed), prompt=tuple(tokens), max_new_tokens=new, **fields)
    return alone(request, True)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_extra["max_model_len"] == 300
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'huge'"):
        client.models.retrieve("huge")


def test_a_chat_whole(client):
    tokens, text = wanted(rendered(TALK), 30)
    reply = client.chat.completions.create(model="tiny", messages=TALK, temperature=0, max_completion_tokens=30)
    (choice,) = reply.choices
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if tokens[-1] == 256 else "length")
    assert reply.usage.prompt_tokens == len(rendered(TALK))
    assert reply.usage.completion_tokens == len(tokens)
    assert reply.usage.total_tokens == len(rendered(TALK)) + len(tokens)


def test_a_chat_as_a_stream_is_the_whole_in_pieces(client):
    _, text = wanted(rendered(TALK), 30)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=TALK, temperature=0, max_tokens=30, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == len(rendered(TALK))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_parts_of_a_message_and_developers_are_read(client):
    parts = [{"type": "text", "text": "Héllo "}, {"type": "text", "text": "🌍"}]
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    options = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    one, other = (client.chat.completions.create(messages=messages, **options) for messages in (talk, TALK))
    assert one.choices[0].message.content == other.choices[0].message.content


@pytest.mark.parametrize("prompt", ["Once upon a time", [79, 110, 99, 101]])
def test_a_completion_whole_and_as_a_stream(client, prompt):
    ids = byte_tokenizer()(prompt).input_ids if isinstance(prompt, str) else prompt
    tokens, text = wanted(ids, 20)
    options = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == text and whole.usage.completion_tokens == len(tokens)
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)) == text


def test_several_prompts_and_choices_come_in_order(client):
    prompts = ["abc", "the second prompt"]
    options = {"model": "tiny", "max_tokens": 10, "temperature": 1.1, "top_p": 0.95, "seed": 6, "n": 2}
    reply = client.completions.create(prompt=prompts, extra_body={"top_k": 40}, **options)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in reply.choices]
    for index, text in enumerate(texts):
        request = draw_request(6)  # drawn at 1.1 by seed 6
        row = type(request.row)(request.row.sampling, request.row.stop_tokens, index % 2)
        stops = type(request.stops)((256,), (), (), ())
        ids = byte_tokenizer()(prompts[index // 2]).input_ids
        assert text == wanted(ids, 10, 6, row=row, stops=stops)[1]
    assert texts[0] != texts[1]
    assert reply.usage.prompt_tokens == len("abc") + len("the second prompt")


def test_a_seed_draws_the_same_again_and_none_draws_anew(client):
    def draw(**fields):
        return client.completions.create(model="tiny", prompt="abc", max_tokens=30, **fields).choices[0].text

    assert draw(seed=5) == draw(seed=5)
    assert draw() != draw()


def test_a_stop_string_over_several_tokens_ends_the_text_and_is_not_in_it(client):
    _, text = wanted(byte_tokenizer()("Once").input_ids, 60, stops=draw_request(1).stops)
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    assert len(stop.encode()) >= 3
    for stream in (False, True):
        reply = client.completions.create(
            model="tiny", prompt="Once", temperature=0, max_tokens=60, stop=[stop, "never there"], stream=stream
        )
        chunks = list(reply) if stream else [reply]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_characters_of_several_tokens_come_whole(server, client):
    """Every chunk of a stream is text: no half of a character, and no mark for one."""
    scheduler = server.scheduler
    chosen = [*"né🌍ü".encode(), *b"!"]
    finish, decode = scheduler.slots.finish, scheduler.slots.decode

    def write(tokens):
        """The model is made to say this, one byte a token."""
        left = iter(tokens)

        def first(prefill, slot):
            finish(prefill, slot)
            return next(left)

        def block(limit):
            found = np.array(decode(2))
            for place in range(found.shape[1]):
                found[:, place] = next(left, 33)
            return found

        scheduler.slots.finish, scheduler.slots.decode = first, block

    try:
        write(chosen)
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=len(chosen), stream=True, seed=1)
        pieces = [chunk.choices[0].text for chunk in stream]
    finally:
        del scheduler.slots.finish, scheduler.slots.decode
    assert "".join(pieces) == "né🌍ü!"
    assert not any("\ufffd" in piece for piece in pieces) and len([piece for piece in pieces if piece]) > 3


def test_the_same_beginning_is_known_and_gives_the_same(client):
    prompt = "A long document that many questions are about. " * 4
    options = {"model": "tiny", "temperature": 0, "max_tokens": 20}
    first = client.completions.create(prompt=f"{prompt}One?", **options)
    again = client.completions.create(prompt=f"{prompt}One?", **options)
    other = client.completions.create(prompt=f"{prompt}Two?", **options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == other.usage.prompt_tokens_details.cached_tokens == 160
    assert again.choices[0].text == first.choices[0].text
    assert other.choices[0].text == wanted(byte_tokenizer()(f"{prompt}Two?").input_ids, 20)[1]


def test_usage_says_what_was_read_and_dense_reads_all(client):
    options = {"model": "tiny", "prompt": "x" * 100, "temperature": 0, "max_tokens": 8}
    sparse = client.completions.create(**options).usage.model_extra["spotlight"]
    dense = client.completions.create(extra_body={"dense": True}, **options).usage.model_extra["spotlight"]
    lengths = range(101, 101 + 7)  # a fifth, and the newest, in no full block of 64 yet
    wanted_share = sum(length - int(0.8 * length) + length - 64 for length in lengths) / sum(lengths)
    assert abs(sparse["share_read"] - wanted_share) < 0.01 and dense["share_read"] == 1
    assert sparse["tokens_cached_per_step"] == dense["tokens_read_per_step"]


def test_dense_is_what_a_model_without_a_selector_gives(client):
    ids = byte_tokenizer()("y" * 90).input_ids
    request = dataclasses.replace(draw_request(1), prompt=tuple(ids), max_new_tokens=25)
    reply = client.completions.create(
        model="tiny", prompt="y" * 90, temperature=0, max_tokens=25, extra_body={"dense": True}
    )
    assert reply.choices[0].text == alone(request, False)[1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"logprobs": 5}}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"keep": 0}}, "keep"),
        ({"extra_body": {"keep": 1e-9}}, "keep"),
        ({"max_tokens": 60, "extra_body": {"keep": 0.3}}, "keep"),
        ({"extra_body": {"budget": 0}}, "budget"),
        ({"extra_body": {"budget": 1.5}}, "budget"),
        ({"max_tokens": 60, "extra_body": {"budget": 39}}, "budget"),
        ({"extra_body": {"keep": 0.1, "budget": 5}}, "budget"),
        ({"extra_body": {"keep": 0.1, "dense": True}}, "dense"),
        ({"extra_body": {"wholly_unknown": 1}}, "wholly_unknown"),
        ({"extra_body": {"dense": "yes"}}, "dense"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": 301}, "messages"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 40}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_or_wrong_is_refused_by_name(client, fields, named):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 5, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == named, caught.value.body
    assert named.rpartition(".")[2] in caught.value.message or named == "messages"


def test_what_does_nothing_is_taken(client):
    client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=2, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, n=1,
        response_format={"type": "text"}, tools=[], user="me", stop=None, logprobs=False, metadata=None,
    )  # fmt: skip


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"has 280 tokens and 30 may follow, together 310; .* at most 300"):
        client.completions.create(model="tiny", prompt="x" * 280, max_tokens=30)


def test_a_seed_that_has_no_room_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="seed is -1; give a whole number from 0 to 4294967295"):
        client.completions.create(model="tiny", prompt="x", seed=-1)


def test_a_wrong_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'; this server has 'tiny'"):
        client.chat.completions.create(model="gpt-5", messages=TALK)


def test_many_async_streams_at_once_get_what_each_gets_alone(server):
    requests = [draw_request(seed, most=150) for seed in range(40, 64)]

    async def ask(client, request):
        sampling = request.row.sampling
        fields = {} if sampling.temperature == 0 else {"top_p": sampling.top_p, "extra_body": {"top_k": sampling.top_k}}
        if sampling.temperature and request.row.number:
            return
        stream = await client.completions.create(
            model="tiny", prompt=list(request.prompt), max_tokens=request.max_new_tokens, stream=True,
            temperature=sampling.temperature, seed=sampling.seed, stop=list(request.stops.strings) or None, **fields,
        )  # fmt: skip
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == alone(request, True)[1], request.id

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(ask(client, request) for request in requests))

    asyncio.run(ask_all())
    server.wait_until_idle()


def test_a_failure_in_a_stream_is_an_error_of_the_client(server, client, monkeypatch):
    def fail(limit):
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(server.scheduler.slots, "decode", fail)
    with pytest.raises(openai.APIError, match="the server failed on this request") as caught:
        list(client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0, stream=True))
    assert "secret" not in json.dumps(caught.value.body)
    with pytest.raises(openai.InternalServerError, match="the server failed on this request"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0)
