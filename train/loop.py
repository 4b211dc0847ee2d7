"""The loop of a training run: its steps, signals that end it, resuming, dry runs."""

import contextlib
import dataclasses
import pathlib
import shlex
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from spotlight_jax import cli, runs
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import Display, print_result
from spotlight_jax.errors import InputError
from spotlight_jax.memory import GIB
from spotlight_jax.models.source import lasting_name
from train import estimate, processes
from train.checkpointing import newest_step
from train.config import LayerwiseConfig
from train.data import open_inputs
from train.report import print_results, write_results
from train.trainer import Trainer, check_finite, first_state, step_once

_TIMED_STEPS = 3  # of a dry run


def main(cfg: LayerwiseConfig) -> dict[str, Any]:
    """Train as `cfg` says; the last line on stdout is the summary as JSON."""
    summary = train(cfg)
    if processes.is_first():
        print_result(summary)
    return summary


def train(cfg: LayerwiseConfig) -> dict[str, Any]:
    """Train as `cfg` says; returns the summary that is also written to the run folder."""
    cfg = processes.join(cfg)  # before JAX looks for devices
    use_compile_cache()
    cfg, path, is_there = _find_run(cfg)
    with _hold_cache(cfg):
        pass  # refused now, not when the model is loaded
    processes.wait("the run's folder is found")  # before anybody writes there
    is_held = processes.is_first() and not cfg.dry_run
    with Display(processes.is_first()) as display, runs.hold(path) if is_held else contextlib.nullcontext():
        with cli.insistent_interrupt():
            plan = announce(cfg, display)
            estimate.check_memory(plan)
            if cfg.dry_run:
                return _dry_run(plan, display)
            inputs = open_inputs(plan, display)
            state = first_state(inputs, display)
        folder = runs.RunFolder(path, processes.is_first())
        if not is_there and processes.is_first():
            folder = runs.RunFolder.create(path, cfg)
        processes.wait("the run's folder is made")
        if is_there and not cfg.resume:
            folder.keep_metrics_before(0)
        with _hold_cache(cfg), _resumable(path):
            with cli.insistent_interrupt():
                trainer = Trainer(inputs, state, folder, display)
            with contextlib.closing(trainer):
                with _explained_memory(), cli.noted_signals(*cli.STOPPING) as stop:  # each ends the run after its step
                    _train(trainer, stop, display)
                summary = write_results(trainer)
    if processes.is_first():
        print_results(rich.console.Console(), trainer, summary)
    return summary


def announce(cfg: LayerwiseConfig, display: Display) -> estimate.Plan:
    """Print the plan of a run before anything is loaded; returns it."""
    plan = estimate.plan_run(cfg)
    for line in estimate.describe(plan):
        display.say(line)
    return plan


def _hold_cache(cfg: LayerwiseConfig) -> contextlib.AbstractContextManager[None]:
    """Keep the folder of hidden states, if there is one, for this process."""
    if cfg.cache_dir is not None and jax.process_count() > 1:
        raise InputError("--cache-dir is filled by one process; train from the text on several hosts, or on one alone")
    return contextlib.nullcontext() if cfg.cache_dir is None else runs.hold(pathlib.Path(cfg.cache_dir))


def resume_command(path: pathlib.Path) -> str:
    """Return the command that continues a run, to be pasted into a shell."""
    return shlex.join(["spotlight", "train", "--resume", "--out", str(path)])


@contextlib.contextmanager
def _resumable(path: pathlib.Path) -> Iterator[None]:
    """Name the command that continues the run where the disk fails."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"'{error.filename or path}' cannot be written: {error.strerror or error}"
        raise InputError(f"{what}; mend that, then continue with: {resume_command(path)}") from error


def _find_run(cfg: LayerwiseConfig) -> tuple[LayerwiseConfig, pathlib.Path, bool]:
    """Return the config of the run, on --resume the one it was started with, its folder, and whether that is there."""
    cfg = dataclasses.replace(cfg, model=lasting_name(cfg.model))
    if not cfg.resume:
        name = f"{pathlib.PurePath(cfg.model).name.removesuffix('.gguf')}-{cfg.preset}"
        path = pathlib.Path(cfg.out) if cfg.out else runs.next_free(pathlib.Path("runs"), name)
        runs.RunFolder.check_free(path)
        return cfg, path, False
    assert cfg.out is not None
    path = pathlib.Path(cfg.out)
    folder = runs.RunFolder(path)
    folder.check_resumed(cfg, ("out", "resume", "dry_run", "distributed", "mesh"))
    return dataclasses.replace(cfg, resume=_has_checkpoint(folder)), path, True


def _has_checkpoint(folder: runs.RunFolder) -> bool:
    """Whether the run has a sound checkpoint; raises InputError where it had some and has none now.

    A run that was killed before its first checkpoint was whole has not been trained: it begins again.
    """
    step, damaged = newest_step(folder.path / "checkpoints")
    processes.check_same(-1 if step is None else step, "checkpoints")
    if step is None and any(row.get("step", 0) > 0 for row in folder.metrics()):
        told = "; ".join(f"checkpoint {number} is damaged ({why})" for number, why in damaged.items())
        raise InputError(f"{told or 'the run has no checkpoint to resume from'}; start it anew in another folder")
    return step is not None


def _train(trainer: Trainer, stop: list[int], display: Display) -> None:
    """Take steps, evaluate and save until the last step or a signal."""
    cfg = trainer.plan.cfg
    if trainer.step == 0:
        trainer.save(is_awaited=True)  # a run that has rows of steps has a checkpoint to resume from
    pending = None  # the step before this one: its report is read while this one runs
    is_stopped = processes.any_of(bool(stop))
    while trainer.step < cfg.steps and not is_stopped:
        report = trainer.take_step()
        is_stopped = processes.any_of(bool(stop))
        if pending is not None:
            trainer.log(*pending)
        pending = (trainer.step, report)
        is_last = trainer.step == cfg.steps
        if is_last or trainer.step % cfg.measure.every == 0 or trainer.step % cfg.save_every == 0 or is_stopped:
            trainer.log(*pending)
            pending = None
        if is_last or trainer.step % cfg.measure.every == 0:
            trainer.evaluate()
        if is_last or trainer.step % cfg.save_every == 0:
            trainer.save()
    if pending is not None:
        trainer.log(*pending)
    if is_stopped:
        trainer.save()
        trainer.close()
        with contextlib.suppress(OSError):  # the terminal may be what was closed
            command = resume_command(trainer.folder.path)
            display.say(f"stopped at step {trainer.step}; continue with: {command}", is_copied=True)
        raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))  # another process's
    trainer.close()  # before the results: what could not be saved is not reported


@contextlib.contextmanager
def _explained_memory() -> Iterator[None]:
    """Name the flags that need less where the device has too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "the device has too little memory; lower --layers-at-once, --ranking.queries-at-once or --data.window "
            "(--dry-run tells what a step needs)"
        ) from None


def _dry_run(plan: estimate.Plan, display: Display) -> dict[str, Any]:
    """Compile one step, time it, and say what it needs."""
    cfg = plan.cfg
    with _explained_memory():
        display.say("compiling a step")
        temporary = estimate.compiled_step_bytes(plan)
        display.say(f"a step works in {temporary / GIB:.2f} GiB beside its inputs; loading the model and the text")
        inputs = open_inputs(plan, display)
        state, forward, loss = first_state(inputs, display), [], []
        display.say("timing")
        for step in range(1 + _TIMED_STEPS):
            started = time.monotonic()
            inputs.feed.forget()
            captured = jax.block_until_ready(inputs.feed.at(step))
            forward.append(time.monotonic() - started)
            started = time.monotonic()
            state, report = step_once(plan, state, step, captured)
            check_finite(report, plan, step)
            loss.append(time.monotonic() - started)
    forward, loss = forward[1:], loss[1:]  # the first step compiles what is left
    # a forward pass takes several windows at once
    forward_seconds, loss_seconds = statistics.median(forward) / plan.windows_at_once, statistics.median(loss)
    seconds = forward_seconds / cfg.steps_per_window + loss_seconds
    stats = jax.local_devices()[0].memory_stats() or {}
    result = {
        "dry_run": True,
        "step_temporary_bytes": temporary,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "forward_seconds": round(forward_seconds, 4),
        "loss_seconds": round(loss_seconds, 4),
        "seconds_per_step": round(seconds, 4),
        "eta_seconds": round(seconds * cfg.steps, 1),
    }
    peak = f", peak of everything so far {result['peak_bytes'] / GIB:.2f} GiB" if result["peak_bytes"] else ""
    if not processes.is_first():
        return result
    print(f"memory    {temporary / GIB:.2f} GiB for a step beside its inputs{peak};")
    print("          lower --layers-at-once or --ranking.queries-at-once if that does not fit")
    print(f"time      {forward_seconds:.3f} s for a window's forward pass, {loss_seconds:.3f} s for a step's losses")
    print(f"          {seconds:.3f} s a step, about {seconds * cfg.steps / 60:.1f} minutes for {cfg.steps} steps")
    return result
