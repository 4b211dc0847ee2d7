"""A request that says how much its steps read gets what a server with that budget would give it."""

import dataclasses
import functools

import numpy as np
import openai
import pytest

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.serve.budgets import check_budget
from spotlight_jax.serve.errors import ApiError
from tests.serve.running import serving
from tests.serve.world import DENSE, SPARSE, decode_alone, draw_request, make_engine, make_scheduler, run_all

OWN = {
    "the server's": None,
    "half the share": dataclasses.replace(SPARSE, keep=0.1),
    "a fixed number": dataclasses.replace(SPARSE, keep=None, budget=8, min_tokens=20),
    "everything": DENSE,
}


@functools.cache
def engine_with(selection):
    """An engine that was built for a budget."""
    tiny = make_engine(True)
    return Engine(tiny.model_cfg, tiny.params, tiny.selector, dataclasses.replace(tiny.cfg, selection=selection))


def test_requests_of_different_budgets_get_what_a_server_of_each_gives():
    """One prompt, in one batch: the budgets alone differ, and so do the texts."""
    one, selections = draw_request(1), [*OWN.values()]
    row, stops = dataclasses.replace(one.row, stop_tokens=()), dataclasses.replace(one.stops, tokens=())
    prompt = tuple(np.random.default_rng(0).integers(0, 255, 90).tolist())
    one = dataclasses.replace(one, prompt=prompt, max_new_tokens=25, row=row, stops=stops)
    scheduler = make_scheduler(is_sparse=True)
    inboxes = run_all(scheduler, [dataclasses.replace(one, selection=own) for own in selections], arrive=1)
    wanted = [decode_alone(engine_with(SPARSE if own is None else own), one) for own in selections]
    assert [inbox.tokens for inbox in inboxes] == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 2


def test_usage_counts_by_each_requests_own_budget():
    """keep .1 of 101 to 120 tokens, or 9 of them, and the newest, in no full block of 64 yet."""
    scheduler = make_scheduler(is_sparse=True)
    one = draw_request(1)
    row, stops = dataclasses.replace(one.row, stop_tokens=()), dataclasses.replace(one.stops, tokens=())
    one = dataclasses.replace(one, prompt=tuple(range(100)), max_new_tokens=21, row=row, stops=stops)
    selections = [OWN["half the share"], dataclasses.replace(OWN["a fixed number"], budget=9)]
    ends = run_all(scheduler, [dataclasses.replace(one, selection=selection) for selection in selections])
    lengths = range(101, 121)
    by_share = sum(max(length - int(0.9 * length), 5) + length - 64 for length in lengths)
    by_number = sum(9 + length - 64 for length in lengths)
    assert [inbox.end.usage.tokens_read for inbox in ends] == [by_share, by_number]


def test_what_no_step_has_room_for_is_refused_with_the_numbers():
    def check(own, server, tokens, end):
        check_budget(own, server, tokens, end, lambda selection: 40)

    server = SelectionConfig(keep=0.2, min_tokens=5)
    check(dataclasses.replace(server, keep=0.2), server, 1, 300)
    check(dataclasses.replace(server, keep=0.05), server, 1, 300)
    check(SelectionConfig(budget=20), server, 100, 300)
    check(SelectionConfig(budget=20), server, 1, 39)  # read whole in any case
    with pytest.raises(ApiError, match=r"budget 20 reads 20 of 51 tokens, and this server at most 11 \(--keep 0.2\)"):
        check(SelectionConfig(budget=20), server, 50, 300)
    with pytest.raises(ApiError, match=r"keep 0.3 reads 60 of 200 tokens, and this server at most 40 \(--keep 0.2\)"):
        check(dataclasses.replace(server, keep=0.3), server, 199, 300)
    fixed = SelectionConfig(budget=30)
    check(dataclasses.replace(server, keep=0.1), fixed, 1, 300)
    with pytest.raises(ApiError, match=r"keep 0.1 reads 31 of 301 tokens, and this server at most 30 \(--budget 30\)"):
        check(dataclasses.replace(server, keep=0.1), fixed, 1, 301)


def test_a_client_says_how_much_is_read():
    with serving() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        options = {"model": "tiny", "prompt": "x" * 100, "temperature": 0, "max_tokens": 8}
        read = [
            client.completions.create(extra_body=own, **options).usage.model_extra["spotlight"]["tokens_read_per_step"]
            for own in ({"dense": True}, {}, {"keep": 0.1}, {"budget": 5}, {"keep": 1})
        ]
        assert read[0] > read[1] > read[2] > read[3] and read[4] == read[0]
        with pytest.raises(openai.BadRequestError, match=r"reads 30 of 101 tokens, and this server at most 21"):
            client.completions.create(extra_body={"budget": 30}, **options)
    with serving(is_sparse=False) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        status, _, reply = server.ask("/v1/completions", {**body, "keep": 0.1})
        assert status == 400 and "this server has none: every token is read" in reply["error"]["message"]
        assert server.ask("/v1/completions", {**body, "dense": True})[0] == 200
