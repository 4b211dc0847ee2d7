"""A server's slots on meshes of virtual devices against one device; `test_meshes` runs this in a process of its own."""

import dataclasses
import sys

import jax
import numpy as np

from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.engine import Engine
from spotlight_jax.memory import plan_serving
from spotlight_jax.models.sharding import config_of_device, open_mesh, place
from spotlight_jax.serve.metrics import Metrics
from spotlight_jax.serve.requests import Done, Request
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.slots import Slots
from tests.byte_tokenizer import byte_tokenizer
from tests.serve.world import DENSE, MODEL, SPARSE, draw_request, make_engine, run_all

SLOTS, CONTEXT, CHUNK, PAGES = 4, 300, 32, 8
LESS = dataclasses.replace(SPARSE, keep=0.1)


def make_requests() -> list[Request]:
    """More than there are slots: greedy and drawn, the last two beginning alike, and each way of reading."""
    document = tuple(np.random.default_rng(5).integers(0, 255, 70).tolist())
    requests = [draw_request(seed) for seed in (1, 2, 3, 5, 7, 9)]
    for index in (4, 5):
        requests[index] = dataclasses.replace(requests[index], prompt=(*document, index))
    selections = (None, DENSE, LESS)
    return [dataclasses.replace(one, selection=selections[index % 3]) for index, one in enumerate(requests)]


def serve_all(engine: Engine, pages: int) -> tuple[list[tuple], list[str], Slots]:
    """What each request gets, what `/metrics` counts of them all, and the slots they ran in."""
    slots, metrics = Slots(engine, SLOTS, CONTEXT, CHUNK, pages), Metrics()
    scheduler = Scheduler(slots, byte_tokenizer(), block=4, queue=64, observer=metrics)
    metrics.watch(scheduler)
    inboxes = run_all(scheduler, make_requests(), arrive=2)
    assert all(isinstance(inbox.end, Done) for inbox in inboxes)
    counted = [line for line in metrics.page().decode().splitlines() if not ("_seconds" in line or "_created" in line)]
    return [(inbox.tokens, inbox.text, inbox.end.usage) for inbox in inboxes], counted, slots


def check_plan(slots: Slots, sizes: dict[str, int]) -> None:
    """A device holds of caches, codes and moments what is planned for it."""
    state = slots.state.cache.layers, slots.staging, slots.pool
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    engine = slots.engine
    rows, max_len = SLOTS // sizes.get("data", 1), slots.max_len // sizes.get("context", 1)
    plan = plan_serving(
        config_of_device(MODEL, sizes), engine.dtype, rows, max_len, CHUNK, slots.pages, engine.selector.cfg,
        engine.cfg.selection, engine.has_tail,
    )  # fmt: skip
    assert plan.cache + plan.codes == own, (sizes, plan, own)


def compare(sizes: dict[str, int]) -> None:
    """Requests that come and go on a mesh get what they get on one device."""
    one, mesh = make_engine(True), open_mesh(sizes, MODEL)
    pages = PAGES if set(sizes) == {"model"} else 0
    expected, counted, _ = serve_all(one, pages)
    several = Engine(MODEL, place(one.params, mesh), one.selector, one.cfg)
    found, own, slots = serve_all(several, pages)
    assert found == expected
    assert sum(len(tokens) for tokens, *_ in found) > 100
    assert own == counted and any(line.startswith("spotlight_tokens_read_total") for line in own)
    assert (found[5][2].cached_tokens == 64) == bool(pages)
    assert not slots.lengths.any() and len(slots.state.cache.layers[1].codes.sharding.device_set) == mesh.size
    check_plan(slots, sizes)
    print("equal:", sizes)


if __name__ == "__main__":
    compare(parse_mesh(sys.argv[1:]))
