"""Train the hash functions of every layer of a frozen LLaMA or Qwen model.

One forward pass of the model per window of text feeds the ranking losses of all layers; only the hash functions learn.
The run folder holds config.yaml, env.json, metrics.jsonl, summary.json, curves.png, layers.png, checkpoints/ and
selector/, which is what generation and evaluation load.

    python -m train.layerwise --preset demo                  two CPU cores, about 5 minutes
    python -m train.layerwise --model MODEL --out runs/mine  a GPU
    python -m train.layerwise --resume --out runs/mine       continue after an interruption, bit for bit

The last line on stdout is the summary as JSON.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import rich.console

from spotlight_jax import cli, runs
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import Display, print_result
from spotlight_jax.errors import InputError
from spotlight_jax.memory import GIB
from spotlight_jax.models.source import lasting_name
from train import plan
from train.config import PRESETS, LayerwiseConfig
from train.report import print_results, write_results
from train.session import Session, check_finite

_TIMED_STEPS = 3  # of a dry run


def command(args: Sequence[str] | None = None) -> int:
    """Run from flags: `python -m train.layerwise` or `spotlight train`."""
    given = list(sys.argv[1:] if args is None else args)
    return cli.run(main, LayerwiseConfig, "train.layerwise", __doc__ or "", given, PRESETS[_preset_of(given)])


def _preset_of(args: Sequence[str]) -> str:
    """The preset that the other flags start from; a wrong name is left to the parser to refuse."""
    name = "default"
    for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or following
    return name if name in PRESETS else "default"


def main(cfg: LayerwiseConfig) -> dict[str, Any]:
    """Train as `cfg` says; the last line on stdout is the summary as JSON."""
    summary = train(cfg)
    print_result(summary)
    return summary


def train(cfg: LayerwiseConfig) -> dict[str, Any]:
    """Train as `cfg` says; returns the summary that is also written to the run folder."""
    use_compile_cache()
    cfg, path = _find_run(cfg)
    with Display() as display:
        session = Session(cfg, display)
        plan.check_memory(cfg, session.model_cfg, session.dtype)
        if cfg.dry_run:
            return _dry_run(session, display)
        session.prepare()
        folder = runs.RunFolder(path) if cfg.resume else runs.RunFolder.create(path, cfg)
        with _explained_memory():
            session.start(folder)
            with cli.noted_signals(signal.SIGINT, signal.SIGTERM) as stop:  # both end the run after its step
                _train(session, stop, display)
        summary = write_results(session, folder)
    print_results(rich.console.Console(), session, summary, folder)
    return summary


def _find_run(cfg: LayerwiseConfig) -> tuple[LayerwiseConfig, pathlib.Path]:
    """The config of the run, on --resume the one it was started with, and its folder, not made yet."""
    cfg = dataclasses.replace(cfg, model=lasting_name(cfg.model))
    if not cfg.resume:
        name = f"{pathlib.PurePath(cfg.model).name.removesuffix('.gguf')}-{cfg.preset}"
        path = pathlib.Path(cfg.out) if cfg.out else runs.next_free(pathlib.Path("runs"), name)
        runs.RunFolder.check_free(path)
        return cfg, path
    assert cfg.out is not None
    path = pathlib.Path(cfg.out)
    stored = runs.RunFolder(path).config(LayerwiseConfig)
    given = set(runs.differences(cfg, PRESETS[cfg.preset]))
    changed = sorted((given & set(runs.differences(cfg, stored))) - {"--out", "--resume", "--dry-run"})
    if changed:
        raise InputError(f"'{cfg.out}' was started with another {', '.join(changed)}; a resumed run keeps its flags")
    return dataclasses.replace(stored, out=cfg.out, resume=True, dry_run=cfg.dry_run), path


def _train(session: Session, stop: list[int], display: Display) -> None:
    """Steps, measurements and checkpoints until the last step or a signal."""
    cfg = session.cfg
    pending = None  # the step before this one: its report is read while this one runs
    while session.step < cfg.steps and not stop:
        report = session.take_step()
        if pending is not None:
            session.log(*pending)
        pending = (session.step, report)
        is_last = session.step == cfg.steps
        if is_last or session.step % cfg.measure.every == 0 or session.step % cfg.save_every == 0 or stop:
            session.log(*pending)
            pending = None
        if is_last or session.step % cfg.measure.every == 0:
            session.measure()
        if is_last or session.step % cfg.save_every == 0:
            session.save()
    if pending is not None:
        session.log(*pending)
    if stop:
        session.save()
        session.close()
        display.say(f"stopped at step {session.step}; continue with: --resume --out {session.folder_path}")
        raise SystemExit(128 + stop[0])
    session.close()


@contextlib.contextmanager
def _explained_memory() -> Iterator[None]:
    """Too little device memory is told with the flags that need less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "the device has too little memory; lower --layers-at-once, --ranking.queries-at-once or --data.window "
            "(--dry-run tells what a step needs)"
        ) from None


def _dry_run(session: Session, display: Display) -> dict[str, Any]:
    """Compile one step, time it, and say what it needs."""
    cfg = session.cfg
    with _explained_memory():
        display.say("compiling a step")
        temporary = session.compiled_step_bytes()
        display.say(f"a step works in {temporary / GIB:.2f} GiB beside its inputs; loading the model and the text")
        session.prepare()
        display.say("timing")
        check_finite(session.take_step(), session)  # compiles what is left
        forward, loss = [], []
        for _ in range(_TIMED_STEPS):
            started = time.monotonic()
            captured = jax.block_until_ready(session.capture_next())
            forward.append(time.monotonic() - started)
            started = time.monotonic()
            check_finite(session.take_step(captured), session)
            loss.append(time.monotonic() - started)
    forward_seconds, loss_seconds = statistics.median(forward), statistics.median(loss)
    seconds = forward_seconds / cfg.steps_per_window + loss_seconds
    stats = jax.devices()[0].memory_stats() or {}
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
    print(f"memory    {temporary / GIB:.2f} GiB for a step beside its inputs{peak};")
    print("          lower --layers-at-once or --ranking.queries-at-once if that does not fit")
    print(f"time      {forward_seconds:.3f} s for a window's forward pass, {loss_seconds:.3f} s for a step's losses")
    print(f"          {seconds:.3f} s a step, about {seconds * cfg.steps / 60:.1f} minutes for {cfg.steps} steps")
    return result


if __name__ == "__main__":
    sys.exit(command())
