"""`spotlight serve`: the model on the device, the scheduler in its thread, HTTP in the main one."""

import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from spotlight_jax.commands.serve import ServeConfig, keeps_pages
from spotlight_jax.commands.session import choose_mesh, read_configs, waiting
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.memory import MemoryPlan, check_memory, plan_serving
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.load import load_model, open_tokenizer
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.sharding import config_of_device, open_mesh, weights_on
from spotlight_jax.models.tokenizer import Tokenizer
from spotlight_jax.selector.checkpoint import Selector, describe_range
from spotlight_jax.serve.app import Limits, Service, make_app
from spotlight_jax.serve.metrics import Metrics
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.serve.translate import Translator
from spotlight_jax.slots import Slots, cache_length

KEY_VARIABLE = "SPOTLIGHT_API_KEY"
MOST_HEADER_BYTES = 16 * 1024
CHUNKS, BLOCKS = {"cpu": 128}, {"cpu": 4}  # by platform; a small block lets newcomers in soon, and costs a look each
GPU_CHUNK, GPU_BLOCK = 1024, 8
AFTER_DRAIN = 5.0  # seconds that answers have to be sent whole


class Server(uvicorn.Server):
    """uvicorn, which drains the scheduler first and leaves with exit code 0."""

    should_exit: bool

    def __init__(self, app: ASGIApp, scheduler: Scheduler, drain: float) -> None:
        """Serve an app.

        Args:
            app: answers requests.
            scheduler: is drained when a signal ends the server.
            drain: seconds that running requests have.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_graceful_shutdown=round(drain + AFTER_DRAIN),
            )
        )
        self.scheduler, self.drain = scheduler, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; a second one does not wait."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those that run."""
        self.scheduler.drain(0.0 if self.force_exit else self.drain)
        await super().shutdown(sockets)


def main(cfg: ServeConfig) -> None:
    """Serve until a signal ends it."""
    console = Console(stderr=True, highlight=False)
    use_compile_cache()
    name, model_cfg, selector = read_configs(cfg, console)
    open_tokenizer(name)  # refuses a model without one before its weights are loaded
    listener = listen(cfg.host, cfg.port)
    with contextlib.closing(listener):
        slots, tokenizer = load_slots(cfg, name, model_cfg, selector, console)
        scheduler, app = build(cfg, name, slots, tokenizer)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving on http://{shown}:{port} (Ctrl-C ends it)", markup=False, soft_wrap=True)
        logging.getLogger("spotlight_jax.serve").setLevel(logging.INFO)
        scheduler.start()
        Server(app, scheduler, cfg.drain).run(sockets=[listener])
    scheduler.drain(0.0)  # a second signal does not wait
    scheduler.join(AFTER_DRAIN)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens; raises InputError where that address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; give another --host or --port"
        ) from None


def load_slots(
    cfg: ServeConfig, name: str, model_cfg: DecoderConfig, selector: Selector | None, console: Console
) -> tuple[Slots, Tokenizer]:
    """Plan the memory, load the weights where they fit, and compile; returns the slots and the tokenizer."""
    platform, dtype = jax.default_backend(), resolve_dtype(cfg.dtype)
    context = min(cfg.context, model_cfg.max_context)
    chunk = min(cfg.prefill_chunk or CHUNKS.get(platform, GPU_CHUNK), context)
    hash_cfg = None if selector is None else selector.cfg
    has_tail = cfg.tail and selector is not None and selector.params.tail is not None

    def kept_on(sizes: dict[str, int]) -> int:
        return (2 * context if keeps_pages(sizes) else 0) if cfg.prefix_tokens is None else cfg.prefix_tokens

    def plan_device(sizes: dict[str, int]) -> MemoryPlan:
        return plan_serving(
            config_of_device(model_cfg, sizes),
            jnp.dtype(dtype),
            -(-cfg.slots // sizes.get("data", 1)),
            cache_length(context, chunk) // sizes.get("context", 1),
            chunk,
            kept_on(sizes) // chunk,
            hash_cfg,
            cfg.selection,
            has_tail,
        )

    sizes, plan, free = choose_mesh(cfg.mesh, model_cfg, plan_device, console)
    kept = kept_on(sizes)
    try:
        check_memory(plan, free, jnp.dtype(dtype))
    except InputError as error:
        raise InputError(
            f"{str(error).partition('; give')[0]}; lower --slots ({cfg.slots}), --context ({context}) or "
            f"--prefix-tokens ({kept}), or give a smaller model or --dtype"
        ) from None
    if selector is not None and (remark := describe_range(selector, context)):
        console.print(remark, markup=False, soft_wrap=True)
    with waiting(console, f"loading {name}"):
        model = load_model(name, dtype, weights_on(open_mesh(sizes, model_cfg)))
    decode_cfg = DecodeConfig(selection=cfg.selection, prefill_chunk=chunk, tail=cfg.tail)
    slots = Slots(Engine(model.cfg, model.params, selector, decode_cfg), cfg.slots, context, chunk, kept // chunk)
    if cfg.warm_up:
        start = time.perf_counter()
        with waiting(console, "compiling") as show:

            def tell(done: int, parts: int, what: str) -> None:
                show(done, parts)
                seconds = time.perf_counter() - start
                console.print(f"compiled {done} of {parts}: {what} ({seconds:.0f} s)", style="dim")

            slots.warm_up(tell)
    return slots, model.tokenizer


def build(cfg: ServeConfig, name: str, slots: Slots, tokenizer: Tokenizer) -> tuple[Scheduler, ASGIApp]:
    """Build the scheduler and the app over it."""
    metrics = Metrics()
    block = cfg.block or BLOCKS.get(jax.default_backend(), GPU_BLOCK)
    scheduler = Scheduler(slots, tokenizer, block, cfg.queue, metrics)
    metrics.watch(scheduler)
    selector = None if cfg.selector is None else Path(cfg.selector).name
    shown = cfg.name or name.rstrip("/").rpartition("/")[2]
    translator = Translator(tokenizer, slots, shown, cfg.seconds, selector)
    service = Service(scheduler, translator, metrics, Limits(cfg.max_body, cfg.body_seconds), cfg.log_prompts)
    return scheduler, make_app(service, cfg.api_key or os.environ.get(KEY_VARIABLE) or None)
