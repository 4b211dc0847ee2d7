"""Requests that come and go get what they get alone, and leave nothing behind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.serve.requests import Done, Failed, QueueFullError, StoppingError
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.slots import Slots
from spotlight_jax.text_stream import TextStream
from tests.byte_tokenizer import byte_tokenizer
from tests.serve.world import (
    DENSE,
    MODEL,
    SPARSE,
    Inbox,
    decode_alone,
    draw_request,
    make_engine,
    make_engine_by_length,
    make_scheduler,
    run_all,
)

REQUESTS = [draw_request(seed) for seed in range(24)]
ROW_SELECTIONS = (
    None,
    DENSE,
    dataclasses.replace(SPARSE, keep=0.1),
    dataclasses.replace(SPARSE, keep=None, budget=9, min_tokens=20),
)


@functools.cache
def alone(request, is_sparse):
    """The tokens and the text of a request by the engine's own prefill and decoding."""
    tokens = decode_alone(make_engine(is_sparse), request)
    stream, text, used = TextStream(byte_tokenizer(), request.stops.strings), "", []
    for token in tokens[: request.max_new_tokens]:
        used.append(token)
        text += stream.push([token])
        if stream.is_stopped or token in request.stops.tokens:
            break
    return used, text + stream.finish()


def check_all(requests, inboxes, is_sparse):
    for request, inbox in zip(requests, inboxes, strict=True):
        tokens, text = alone(request, is_sparse and request.selection is None)
        assert (inbox.tokens, inbox.text) == (tokens, text), request.id
        assert isinstance(inbox.end, Done)
        assert inbox.end.usage.new_tokens == len(tokens)


def check_empty(scheduler):
    """Nothing is left of any request."""
    assert scheduler.is_idle
    assert scheduler.slots.is_done.all() and not scheduler.slots.lengths.any()
    np.testing.assert_array_equal(scheduler.slots.state.cache.lengths, 0)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("pages", [0, 8])
def test_many_requests_at_once_get_what_each_gets_alone(is_sparse, pages):
    requests = [
        dataclasses.replace(one, selection=DENSE if is_sparse and index % 5 == 0 else None)
        for index, one in enumerate(REQUESTS)
    ]
    scheduler = make_scheduler(is_sparse, pages)
    check_all(requests, run_all(scheduler, requests, arrive=2), is_sparse)
    check_empty(scheduler)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_prompt_with_a_known_beginning_gets_the_same_from_its_pages(is_sparse):
    """Prompts of one document: the pages hold the very numbers that prefill would give."""
    document = np.random.default_rng(5).integers(0, 255, 150).tolist()
    requests = [
        dataclasses.replace(one, prompt=(*document[: 150 - 20 * (index % 3)], *one.prompt[:30]), max_new_tokens=40)
        for index, one in enumerate(REQUESTS[:8])
    ]
    scheduler = make_scheduler(is_sparse)
    inboxes = run_all(scheduler, requests[:1]) + run_all(scheduler, requests[1:], arrive=1)
    check_all(requests, inboxes, is_sparse)
    found = [inbox.end.usage.cached_tokens for inbox in inboxes]
    assert found[0] == 0 and all(found[index] >= (128, 128, 96)[index % 3] for index in range(1, 8)), found


def test_sequences_of_different_lengths_keep_their_own_hash_functions():
    """Two sets of them in one batch; nothing compiles after the warm-up, and pages of one set serve it alone."""
    engine = make_engine_by_length()
    slots = Slots(engine, slots=2, context=200, chunk=32, pages=8)
    slots.warm_up()
    known = set(engine.programs)
    prompt = tuple(np.random.default_rng(3).integers(0, 255, 70).tolist())
    requests = [
        dataclasses.replace(REQUESTS[1], id=str(new), prompt=prompt, max_new_tokens=new) for new in (20, 60, 25, 50, 28)
    ]
    scheduler = Scheduler(slots, byte_tokenizer(), block=4, queue=8)
    inboxes = run_all(scheduler, requests)
    assert set(engine.programs) == known
    assert {engine.selector.set_of(len(prompt) + request.max_new_tokens) for request in requests} == {0, 1}
    assert [inbox.end.usage.cached_tokens for inbox in inboxes] == [0, 0, 64, 64, 64]
    for request, inbox in zip(requests, inboxes, strict=True):
        state = engine.prefill([prompt], request.max_new_tokens, rows=[request.row])
        tokens = [int(state.tokens[0])]
        while not np.asarray(state.is_done).all():
            state, more = engine.decode(state)
            tokens += more[0].tolist()
        assert inbox.tokens == tokens[: len(inbox.tokens)] and len(inbox.tokens) == inbox.end.usage.new_tokens


def test_pages_hold_the_numbers_that_prefill_gives():
    scheduler = make_scheduler(is_sparse=True)
    slots, prompt = scheduler.slots, np.random.default_rng(0).integers(0, 255, 70).tolist()

    def prefill(pages, keeps):
        one = slots.begin(prompt, 5, REQUESTS[0].row, SPARSE, pages=pages)
        while not one.is_whole:
            if slots.advance(one) and keeps:
                slots.keep(one, one.done // slots.chunk - 1)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(slots.staging)]

    whole = prefill([], True)
    slots.staging = jax.tree.map(jnp.zeros_like, slots.staging)
    for one, other in zip(whole, prefill([0, 1], False), strict=True):
        if slots.max_len in one.shape:  # moments have no slots
            one, other = (np.take(leaf, range(70), one.shape.index(slots.max_len)) for leaf in (one, other))
        np.testing.assert_array_equal(one, other)


def test_requests_compile_nothing_after_warm_up():
    scheduler = make_scheduler(is_sparse=True)
    scheduler.slots.warm_up()
    known = set(scheduler.slots.engine.programs)
    requests = [
        dataclasses.replace(one, selection=ROW_SELECTIONS[index % 4], logprobs=(None, 5)[index % 2])
        for index, one in enumerate(REQUESTS[:12])
    ]
    compiled = []
    monitor = lambda event, seconds, **options: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(monitor)
    try:
        jax.jit(lambda x: x + 1)(np.zeros(7))
        assert len(compiled) == 1, "the monitor sees what is compiled"
        run_all(scheduler, requests, arrive=1)
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(compiled) == 1 and set(scheduler.slots.engine.programs) == known


def test_a_request_that_is_cancelled_is_gone_after_a_block():
    scheduler = make_scheduler()
    requests = [dataclasses.replace(one, max_new_tokens=50, stops=REQUESTS[1].stops) for one in REQUESTS[1:6:2]]
    inboxes = [Inbox() for _ in requests]
    tickets = scheduler.submit(requests, inboxes)
    for _ in range(12):
        scheduler.round()
    (cut,) = [slot for slot, ticket in scheduler.running.items() if ticket is tickets[1]]
    scheduler.cancel(tickets[1])
    given = len(inboxes[1].events)
    scheduler.round()
    assert scheduler.slots.lengths[cut] == 0 and len(inboxes[1].events) == given
    while not scheduler.is_idle:
        scheduler.round()
    check_all(requests[::2], inboxes[::2], False)
    check_empty(scheduler)


def test_whoever_waits_or_is_prefilled_can_leave_too():
    scheduler = make_scheduler()
    long = dataclasses.replace(REQUESTS[1], prompt=REQUESTS[1].prompt * 20, max_new_tokens=9)
    long = dataclasses.replace(long, prompt=long.prompt[:200])
    inboxes = [Inbox() for _ in range(5)]
    tickets = scheduler.submit([long] * 5, inboxes)
    scheduler.round()
    assert scheduler.joining is not None and scheduler.joining[0] is tickets[0]
    for ticket in (tickets[0], tickets[4]):
        scheduler.cancel(ticket)
    while not scheduler.is_idle:
        scheduler.round()
    assert [len(inbox.events) > 0 for inbox in inboxes] == [False, True, True, True, False]
    check_all([long] * 3, inboxes[1:4], False)
    check_empty(scheduler)


def test_running_sequences_wait_for_at_most_one_chunk_and_one_block():
    """However long the prompts of newcomers are, whoever runs gets tokens in every round."""
    scheduler = make_scheduler()
    runner = dataclasses.replace(REQUESTS[1], max_new_tokens=60, stops=REQUESTS[1].stops)
    runner = dataclasses.replace(runner, row=dataclasses.replace(runner.row, stop_tokens=()))
    inbox = Inbox()
    scheduler.submit([runner], [inbox])
    while not scheduler.running:
        scheduler.round()
    newcomer = dataclasses.replace(runner, prompt=tuple(range(200)))
    scheduler.submit([newcomer] * 2, [Inbox(), Inbox()])
    for _ in range(8):
        before = len(inbox.tokens)
        done = 0 if scheduler.joining is None else scheduler.joining[1].done
        scheduler.round()
        assert len(inbox.tokens) == before + 4
        if scheduler.joining is not None and done:
            assert scheduler.joining[1].done - done <= scheduler.slots.chunk


def test_requests_that_take_too_long_end_in_words_and_others_go_on():
    now = [0.0]
    scheduler = make_scheduler(clock=lambda: now[0])
    late = dataclasses.replace(REQUESTS[1], max_new_tokens=50, deadline=1.0)
    inboxes = [Inbox(), Inbox()]
    scheduler.submit([late, REQUESTS[3]], inboxes)
    for _ in range(3):
        scheduler.round()
    now[0] = 2.0
    while not scheduler.is_idle:
        scheduler.round()
    assert isinstance(inboxes[0].end, Failed) and inboxes[0].end.failure == "timeout"
    check_all([REQUESTS[3]], inboxes[1:], False)
    check_empty(scheduler)


def test_a_full_queue_takes_no_more_and_several_requests_are_taken_whole():
    scheduler = make_scheduler(queue=2)
    scheduler.submit(REQUESTS[:4], [Inbox() for _ in range(4)])  # three slots, two places
    with pytest.raises(QueueFullError):
        scheduler.submit(REQUESTS[4:6], [Inbox(), Inbox()])
    assert len(scheduler.waiting) == 4
    scheduler.submit(REQUESTS[4:5], [Inbox()])
    while not scheduler.is_idle:
        scheduler.round()
    check_empty(scheduler)


def poison(slots, slot):
    """A sequence's cached values become what no softmax survives."""
    layers = tuple(layer.replace(values=layer.values.at[slot].set(jnp.nan)) for layer in slots.state.cache.layers)
    slots.state = slots.state.replace(cache=slots.state.cache.replace(layers=layers))


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_sequence_whose_numbers_break_takes_no_other_with_it(is_sparse):
    scheduler = make_scheduler(is_sparse)
    requests = [dataclasses.replace(one, max_new_tokens=50) for one in (REQUESTS[1], REQUESTS[7], REQUESTS[5])]
    inboxes = [Inbox() for _ in requests]
    tickets = scheduler.submit(requests, inboxes)
    while len(scheduler.running) < 3:
        scheduler.round()
    poison(scheduler.slots, next(slot for slot, ticket in scheduler.running.items() if ticket is tickets[1]))
    while not scheduler.is_idle:
        scheduler.round()
    assert isinstance(inboxes[1].end, Failed) and "not finite" in inboxes[1].end.message
    check_all(requests[::2], inboxes[::2], is_sparse)
    check_empty(scheduler)


def test_a_prefill_that_breaks_fails_alone_and_a_broken_block_fails_those_in_it(monkeypatch, caplog):
    scheduler = make_scheduler()
    requests = [dataclasses.replace(one, max_new_tokens=50) for one in (REQUESTS[1], REQUESTS[7], REQUESTS[5])]
    inboxes = [Inbox() for _ in requests]
    scheduler.submit(requests[:1], inboxes[:1])
    while not scheduler.running:
        scheduler.round()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.slots, "advance", lambda prefill: 1 // 0)
        scheduler.submit(requests[1:2], inboxes[1:2])
        scheduler.round()
    assert isinstance(inboxes[1].end, Failed) and inboxes[1].end.failure == "internal"
    assert "ZeroDivisionError" not in inboxes[1].end.message and "ZeroDivisionError" in caplog.text
    while not scheduler.is_idle:
        scheduler.round()
    check_all(requests[:1], inboxes[:1], False)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.slots, "decode", lambda limit: 1 // 0)
        broken = Inbox()
        scheduler.submit(requests[:1], [broken])
        while not scheduler.is_idle:
            scheduler.round()
    assert isinstance(broken.end, Failed)
    scheduler.submit(requests[2:], inboxes[2:])
    while not scheduler.is_idle:
        scheduler.round()
    check_all(requests[2:], inboxes[2:], False)


def test_a_text_that_no_tokenizer_gives_fails_alone(monkeypatch, caplog):
    scheduler = make_scheduler()
    inboxes = [Inbox(), Inbox()]
    tickets = scheduler.submit([REQUESTS[1], REQUESTS[3]], inboxes)
    monkeypatch.setattr(tickets[0].stream, "push", lambda tokens: 1 // 0)
    while not scheduler.is_idle:
        scheduler.round()
    assert isinstance(inboxes[0].end, Failed) and "are no text" in caplog.text
    check_all([REQUESTS[3]], inboxes[1:], False)
    check_empty(scheduler)


def test_a_newcomer_that_cannot_begin_fails_alone(monkeypatch):
    scheduler = make_scheduler()
    inboxes = [Inbox(), Inbox()]
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.slots, "begin", lambda *args: 1 // 0)
        scheduler.submit([REQUESTS[1]], inboxes[:1])
        scheduler.round()
    assert isinstance(inboxes[0].end, Failed)
    scheduler.submit([REQUESTS[3]], inboxes[1:])
    while not scheduler.is_idle:
        scheduler.round()
    check_all([REQUESTS[3]], inboxes[1:], False)
    check_empty(scheduler)


def test_a_drained_scheduler_ends_what_runs_and_takes_no_more():
    scheduler = make_scheduler()
    requests = [dataclasses.replace(one, max_new_tokens=40) for one in REQUESTS[1:12:2]]
    inboxes = [Inbox() for _ in requests]
    scheduler.submit(requests, inboxes)
    for _ in range(9):
        scheduler.round()
    count = len(scheduler.running) + (scheduler.joining is not None)
    scheduler.start()
    scheduler.drain(60.0)
    with pytest.raises(StoppingError):
        scheduler.submit(requests, inboxes)
    scheduler.join(60.0)
    ends = [inbox.end for inbox in inboxes]
    assert all(isinstance(end, Done) or end.failure == "stopping" for end in ends)
    assert sum(isinstance(end, Done) for end in ends) >= count > 0
    assert any(isinstance(end, Failed) for end in ends)
    check_empty(scheduler)


def test_after_the_drain_time_running_requests_get_a_clear_error():
    scheduler = make_scheduler()
    endless = dataclasses.replace(REQUESTS[1], max_new_tokens=90)
    inbox = Inbox()
    scheduler.submit([endless], [inbox])
    while not scheduler.running:
        scheduler.round()
    scheduler.drain(0.0)
    scheduler.start()
    scheduler.join(60.0)
    assert isinstance(inbox.end, Failed) and inbox.end.message == "the server is stopping"
    check_empty(scheduler)


def test_usage_counts_the_tokens_that_steps_read():
    """By the budget's rule: keep .2, at least 5, from 40 tokens on; and the newest, in no full block of 64 yet."""
    scheduler = make_scheduler(is_sparse=True)
    row = dataclasses.replace(REQUESTS[1].row, stop_tokens=())
    stops = dataclasses.replace(REQUESTS[1].stops, tokens=())
    request = dataclasses.replace(REQUESTS[1], prompt=tuple(range(100)), max_new_tokens=21, row=row, stops=stops)
    sparse, dense = run_all(scheduler, [request, dataclasses.replace(request, selection=DENSE)])
    lengths = list(range(101, 121))
    wanted = sum(max(length - int(0.8 * length), 5) + length - 64 for length in lengths)
    assert (sparse.end.usage.steps, sparse.end.usage.tokens_read) == (20, wanted)
    assert sparse.end.usage.tokens_cached == dense.end.usage.tokens_read == sum(lengths)


def test_the_model_reads_prompts_up_to_the_context_whole():
    scheduler = make_scheduler()
    prompt = tuple(np.random.default_rng(1).integers(0, 255, 290).tolist())
    request = dataclasses.replace(REQUESTS[1], prompt=prompt, max_new_tokens=10)
    check_all([request], run_all(scheduler, [request]), False)
    assert MODEL.max_context >= 300
