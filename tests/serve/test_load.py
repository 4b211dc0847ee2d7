"""Many requests of all lengths, exact; many that are cut off, and nothing left over. Many minutes: `make soak`."""

import asyncio
import dataclasses
import functools
import resource

import numpy as np
import openai
import pytest

from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.engine import Engine
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.slots import Slots
from tests.byte_tokenizer import byte_tokenizer
from tests.serve.running import serving
from tests.serve.world import MODEL, SPARSE, draw_request, make_engine, run_all

pytestmark = pytest.mark.soak
LONG = dataclasses.replace(MODEL, max_len=8192)


@functools.cache
def long_slots(is_sparse, pages):
    """Eight slots of 6,200 tokens, over the weights of the tiny model."""
    tiny = make_engine(is_sparse)
    cfg = DecodeConfig(selection=dataclasses.replace(SPARSE, min_context=200) if is_sparse else tiny.cfg.selection)
    return Slots(Engine(LONG, tiny.params, tiny.selector, cfg), slots=8, context=6200, chunk=128, pages=pages)


def draw_requests():
    """Lengths from 1 to 6,000, evenly in their logarithm; every fourth begins as the one before."""
    rng = np.random.default_rng(0)
    requests = []
    for seed in range(64):
        one = draw_request(seed)
        prompt = rng.integers(0, 255, int(np.exp(rng.uniform(0, np.log(6000))))).tolist()
        if seed % 4 == 3:
            prompt = [*requests[-1].prompt[:5000], *prompt[:500]]
        requests.append(dataclasses.replace(one, prompt=tuple(prompt), max_new_tokens=int(rng.integers(1, 100))))
    return requests


@pytest.mark.parametrize("is_sparse", [False, True])
def test_sixty_four_requests_of_all_lengths_get_what_each_gets_alone(is_sparse):
    """Alone in the same server; with what was known of their beginnings, and without."""
    requests, found = draw_requests(), {}
    for pages in (0, 160):
        slots = long_slots(is_sparse, pages)
        scheduler = Scheduler(slots, byte_tokenizer(), block=8, queue=64)
        inboxes = run_all(scheduler, requests, arrive=1)
        found[pages] = [inbox.tokens for inbox in inboxes]
        assert all(inbox.end.usage.new_tokens == len(inbox.tokens) > 0 for inbox in inboxes)
        assert (sum(inbox.end.usage.cached_tokens for inbox in inboxes) > 0) == (pages > 0)
    assert found[0] == found[160]
    scheduler = Scheduler(long_slots(is_sparse, 0), byte_tokenizer(), block=8, queue=64)
    for request, tokens in zip(requests, found[0], strict=True):
        (alone,) = run_all(scheduler, [request])
        assert alone.tokens == tokens, (request.id, len(request.prompt))


# what the client leaves of a stream that is cut off complains when it is freed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_five_hundred_requests_of_which_two_hundred_are_cut_off_leave_nothing_behind():
    rng = np.random.default_rng(1)
    plans = [(int(rng.integers(1, 200)), int(rng.integers(1, 90)), index % 5 < 2) for index in range(500)]

    async def ask(client, gate, prompt, new, is_cut):
        async with gate:
            stream = await client.completions.create(model="tiny", prompt="x" * prompt, max_tokens=new, stream=True)
            events, left = stream.__aiter__(), 1 + prompt % 4 if is_cut else -1
            async for _ in events:
                left -= 1
                if left == 0:
                    await events.aclose()
                    await stream.close()
            return left != 0

    async def ask_all(url):
        gate = asyncio.Semaphore(40)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, gate, *plan) for plan in plans))

    with serving() as server:
        ended = asyncio.run(ask_all(server.url))
        assert all(ended[index] for index, plan in enumerate(plans) if not plan[2])
        server.wait_until_idle()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        asyncio.run(ask_all(server.url))
        server.wait_until_idle()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB: no slope to speak of
        assert not server.scheduler.slots.lengths.any()
