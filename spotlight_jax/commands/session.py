"""What generate and chat share: a model that is loaded only after it was seen to fit, and decoding with Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from spotlight_jax import cli
from spotlight_jax.commands.flags import SessionConfig
from spotlight_jax.commands.serve import ServeConfig
from spotlight_jax.config.generation import GenerateConfig, make_decode_config
from spotlight_jax.config.mesh import describe_mesh, parse_mesh
from spotlight_jax.decode_step import DecodeState
from spotlight_jax.engine import Engine
from spotlight_jax.generation import STREAM_BLOCK, Report, Run, head_shape, make_engine
from spotlight_jax.memory import GIB, MemoryPlan, available_bytes, check_memory, plan_memory
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.load import BaseModel, load_config, load_model
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.sharding import check_mesh, config_of_device, open_mesh, smallest_fit, weights_on
from spotlight_jax.models.tokenizer import Tokenizer
from spotlight_jax.selector.checkpoint import Selector, check_shape, choose_model, describe_range, load_selector
from spotlight_jax.stops import find_stops

MIB = 2**20


def read_configs(cfg: SessionConfig | ServeConfig, console: Console) -> tuple[str, DecoderConfig, Selector | None]:
    """Return the model's name, its config, and the selector, checked against each other; weights are not needed.

    Args:
        console: where it is said that the selector was trained for another model.
    """
    selector = None if cfg.selector is None else load_selector(cfg.selector)
    name, remarks = choose_model(cfg.model, {} if selector is None else {str(cfg.selector): selector})
    model_cfg = load_config(name)
    if selector is not None:
        what = f"selector '{cfg.selector}' (trained for {selector.base_model})"
        check_shape(selector.shape, head_shape(model_cfg), what)
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)
    return name, model_cfg, selector


def load_fitting(
    cfg: SessionConfig,
    name: str,
    model_cfg: DecoderConfig,
    selector: Selector | None,
    prompt_lengths: list[int],
    console: Console,
) -> tuple[BaseModel, Engine]:
    """Plan the memory, say so, and only then load the weights; raises InputError where they cannot fit."""
    generation, dtype = cfg.generation, resolve_dtype(cfg.dtype)
    probe = Engine(model_cfg, {"embed": {"table": jnp.zeros((), dtype)}}, None, make_decode_config(generation))
    longest = max(prompt_lengths)

    def plan_device(sizes: dict[str, int]) -> MemoryPlan:
        return plan_memory(
            config_of_device(model_cfg, sizes),
            dtype,
            -(-len(prompt_lengths) // sizes.get("data", 1)),
            probe.capacity(0, longest, generation.max_new_tokens) // sizes.get("context", 1),
            probe.chunk_length(longest),
            None if selector is None else selector.cfg,
            generation.selection,
            generation.tail and selector is not None and selector.params.tail is not None,
        )

    sizes, plan, free = choose_mesh(cfg.mesh, model_cfg, plan_device, console)
    check_memory(plan, free, dtype)
    with waiting(console, f"loading {name}"):
        model = load_model(name, dtype, weights_on(open_mesh(sizes, model_cfg)))
    for line in find_stops(model.cfg, model.tokenizer, generation.stop).unmatched:
        console.print(line, markup=False, soft_wrap=True)
    return model, make_engine(model, generation, selector)


def choose_mesh(
    given: Sequence[str],
    model_cfg: DecoderConfig,
    plan_device: Callable[[dict[str, int]], MemoryPlan],
    console: Console,
) -> tuple[dict[str, int], MemoryPlan, int | None]:
    """Return the mesh that is asked for, or else the smallest that fits; what a device holds of it, which is said; and
    what a device has free.

    Args:
        given: axes, as `--mesh` takes them; none: what fits, on GPUs.
        model_cfg: the model's.
        plan_device: what one device of a mesh holds.
        console: where the plan is said.

    Raises: InputError for a mesh that this model or this machine cannot have.
    """
    sizes, free = parse_mesh(given), available_bytes()
    check_mesh(sizes, model_cfg, len(jax.devices()))
    if not sizes and free is not None and jax.default_backend() != "cpu":
        sizes = smallest_fit(model_cfg, len(jax.devices()), lambda sizes: plan_device(sizes).total <= free)
    plan = plan_device(sizes)
    known = "" if free is None else f" of {free / GIB:.2f} free"
    where = f" on each device of mesh {describe_mesh(sizes)}" if sizes else ""
    console.print(f"memory: {plan.describe()}{known}{where}", style="dim", soft_wrap=True)
    return sizes, plan, free


@contextlib.contextmanager
def waiting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show in a terminal what is being waited for and how far it is, until the block is left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def decode(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    generation: GenerateConfig,
    console: Console,
    write: Callable[[str], None] | None = None,
    state: DecodeState | None = None,
    other: Run | None = None,
) -> tuple[Run, bool]:
    """Read the prompts and decode until every sequence has ended, or until Ctrl-C, which ends it after a block.

    Args:
        console: where a terminal shows what is being waited for, and a line where a sequence goes beyond the positions
            that the selector was fitted to.
        write: gets the text of the one prompt as it comes.
        state: of an earlier run, to go on after its cache; it is given up.
        other: a run of the same prompts, to continue them anew; see `Run.again`.

    Returns: the run, and whether it was interrupted. A Ctrl-C during the prompt, or a second one, is KeyboardInterrupt.
    """
    cached = 0 if state is None else int(state.cache.lengths.max())
    longest = cached + max(map(len, prompts)) + generation.max_new_tokens
    if engine.selector is not None and (remark := describe_range(engine.selector, longest)):
        console.print(remark, markup=False, soft_wrap=True)
    with waiting(console, "reading the prompt") as show:
        run = other.again(engine) if other else Run(engine, tokenizer, prompts, generation, state, show)
    with cli.noted_signals(signal.SIGINT) as stop:
        if write is None:
            with waiting(console, "decoding") as show:
                while not (run.is_done or stop):
                    run.step()
                    show(max(map(len, run.tokens)), generation.max_new_tokens)
            return run, bool(stop)
        with waiting(console, "compiling a decoding step"):
            text = run.pieces[0] + ("" if run.is_done else run.step(STREAM_BLOCK)[0])
        write(text)
        while not (run.is_done or stop):
            write(run.step(STREAM_BLOCK)[0])
    return run, bool(stop)


def describe(report: Report, selector: Selector | None, cfg: GenerateConfig, model_cfg: DecoderConfig) -> list[str]:
    """Return the lines of a report."""
    reads = report.reads
    lines = [
        f"prompt      {report.prompt_tokens} tokens, {report.prefill_rate:,.1f} tokens/s",
        f"decode      {report.new_tokens} tokens after the first, {report.decode_rate:,.1f} tokens/s",
    ]
    if report.compile_seconds >= 0.05:
        lines.append(f"compile     {report.compile_seconds:.1f} s (not in the rates; kept for the next start)")
    dense_bytes = f"{reads.bytes_dense / MIB:,.1f} MiB"
    if reads.bytes_keys_values == reads.bytes_dense:
        why = "" if selector is None else " (too few for reading less to pay; --min-context 0 reads less all the same)"
        return [*lines, f"read/step   all {reads.tokens} tokens{why}: K/V {dense_bytes}"]
    read = reads.bytes_keys_values + reads.bytes_codes
    dense = [layer for layer in cfg.selection.dense_layers if layer < model_cfg.layers]
    budget = f"keep {cfg.selection.share:g}" if cfg.selection.budget is None else f"budget {cfg.selection.budget}"
    lines.append(
        f"read/step   {reads.tokens} tokens per head ({budget}): K/V {reads.bytes_keys_values / MIB:,.1f} MiB + codes "
        f"{reads.bytes_codes / MIB:,.1f} MiB = {read / max(reads.bytes_dense, 1):.1%} of dense {dense_bytes}"
    )
    lines.append(f"dense       layers {', '.join(map(str, dense)) or 'none'} of {model_cfg.layers}")
    return lines
