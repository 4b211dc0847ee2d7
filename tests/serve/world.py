"""A tiny model behind slots and a scheduler, for all tests of the server."""

import dataclasses
import functools
import threading

import jax
import numpy as np

from spotlight_jax.config.generation import DecodeConfig, RowConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.serve.requests import Done, Failed, Piece, Request
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.slots import Slots
from spotlight_jax.stops import find_stops
from spotlight_jax.tail import init_tail
from tests.byte_tokenizer import byte_tokenizer
from tests.hash_params import draw_params

MODEL = PRESETS["tiny"]
SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=40, dense_layers=(0,))
DENSE = dataclasses.replace(SPARSE, keep=1.0)


@functools.cache
def make_engine(is_sparse: bool) -> Engine:
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), MODEL))
    selector = None
    if is_sparse:
        shape = HeadShape(MODEL.layers, MODEL.q_heads, MODEL.kv_heads, MODEL.head_dim)
        functions = draw_params(TransformConfig(code_bits=64), shape)
        functions = dataclasses.replace(functions, tail=init_tail(MODEL.layers, MODEL.q_heads))
        selector = Selector(shape, functions, "tiny", {})
    selection = SPARSE if is_sparse else SelectionConfig()
    return Engine(MODEL, params, selector, DecodeConfig(selection=selection, prefill_chunk=32))


@functools.cache
def make_engine_by_length() -> Engine:
    """Sequences of up to 100 tokens are coded by hash functions of their own."""
    engine = make_engine(True)
    assert engine.selector is not None
    short = draw_params(TransformConfig(code_bits=64), engine.selector.shape, seed=7)
    short = dataclasses.replace(short, tail=init_tail(MODEL.layers, MODEL.q_heads))
    both = dataclasses.replace(engine.selector, positions=400, shorter=((100, short),))
    return Engine(MODEL, engine.params, both, engine.cfg)


@functools.cache
def make_slots(is_sparse: bool, pages: int = 8) -> Slots:
    """Slots that every test of a kind shares, and leaves empty."""
    return Slots(make_engine(is_sparse), slots=3, context=300, chunk=32, pages=pages)


def make_scheduler(is_sparse=False, pages=8, block=4, queue=64, **options) -> Scheduler:
    slots = make_slots(is_sparse, pages)
    slots.reset()
    return Scheduler(slots, byte_tokenizer(), block, queue, **options)


class Inbox:
    """Events of one request."""

    def __init__(self):
        self.events, self.is_over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.is_over.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def tokens(self):
        return [token for event in self.events if isinstance(event, Piece) for token in event.tokens]

    @property
    def end(self):
        return self.events[-1]


def draw_request(seed, most=200) -> Request:
    """A random prompt with random settings: greedy ones, drawn ones, some that end by themselves."""
    rng = np.random.default_rng(seed)
    prompt = tuple(rng.integers(0, 255, rng.integers(1, most)).tolist())
    sampling = SamplingConfig() if seed % 2 else SamplingConfig(1.1, top_k=40, top_p=0.95, seed=seed)
    stops = find_stops(MODEL, byte_tokenizer(), ("qz", "e") if seed % 3 == 0 else ())
    row = RowConfig(sampling, stops.tokens, seed % 2)
    return Request(f"request-{seed}", prompt, int(rng.integers(1, 60)), row, stops)


def decode_alone(engine: Engine, request: Request) -> list[int]:
    """The tokens of a request by the engine's own prefill and decoding."""
    state = engine.prefill([request.prompt], request.max_new_tokens, rows=[request.row])
    tokens = [int(state.tokens[0])]
    while not np.asarray(state.is_done).all():
        state, more = engine.decode(state)
        tokens += more[0].tolist()
    return tokens


def run_all(scheduler: Scheduler, requests, arrive=None) -> list[Inbox]:
    """Each request's events; `arrive` of them come before each round."""
    inboxes, coming = [Inbox() for _ in requests], list(range(len(requests)))
    while coming or not scheduler.is_idle:
        now = coming[: arrive or len(coming)]
        del coming[: len(now)]
        for place in now:
            scheduler.submit([requests[place]], [inboxes[place]])
        scheduler.round()
    return inboxes
