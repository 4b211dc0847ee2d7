"""Train several recipes side by side on the same windows, seed and forward passes, and compare them in one table.

    python -m train.ablate --out runs/ablation --layers-at-once 10               # one GPU, smollm2-135m
    python -m train.ablate --variants paper default --steps 24 --window 2048     # two CPU cores
    python -m train.ablate --out runs/ablation --resume --perplexity runs/ppl    # adds an evaluation's perplexities

Every variant is a run folder of its own, with its selector. Stopped by Ctrl-C or SIGTERM, it measures what is trained
so far; --resume begins those anew. Perplexities come from the evaluation, whose command is printed at the end;
`--perplexity` reads its folder. The last line on stdout is the table as JSON.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from spotlight_jax import cli, files, runs
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.data import DataConfig
from spotlight_jax.config.selection import MIN_TOKENS
from spotlight_jax.display import Display, make_table, open_console, print_result, print_table
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.metrics import SelectionQuality
from spotlight_jax.models.config import nearest
from train.config import PRESETS, EvaluationConfig, LayerwiseConfig, with_recipe
from train.data import open_inputs
from train.estimate import compiled_step_bytes
from train.evaluate import mean_over_sparse
from train.loop import announce
from train.plots import plot_ablation
from train.report import write_results
from train.trainer import Trainer, first_state

_ROW = "ablation.json"  # of each variant, in its folder, and of all
_NEVER = 10**9  # steps between evaluations and checkpoints: a variant is evaluated at its end
_ALL_TEXTS = "all texts"  # what `eval.perplexity` calls all of them together
_KEEPS = (0.02, 0.1)  # shares whose perplexities the table has


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """Which recipes, on what."""

    variants: tuple[str, ...] = ()
    """Which variants to train; without this flag all of them (a wrong name lists them)."""
    model: str = "smollm2-135m"
    """Base model."""
    out: str | None = None
    """Folder of the ablation; without it, a new one under runs/."""
    resume: bool = False
    """Continue the ablation in --out: variants that are finished are not trained again."""
    steps: int = PRESETS["default"].steps
    """Optimiser steps of a variant that does not say otherwise."""
    window: int = 8192
    """Tokens in a window of a variant that does not say otherwise; all are measured on windows of this length."""
    train: tuple[str, ...] = DataConfig().train
    """Training texts."""
    copies: float = 0.0
    """Share of the training windows in which a passage comes twice."""
    held_out: tuple[str, ...] = ("embedded-test",)
    """Texts to measure on."""
    held_out_windows: int = 12
    """Windows of them."""
    queries_at_once: int = 256
    """Queries worked on together: lower it to use less memory."""
    layers_at_once: int = 1
    """Layers worked on together: higher is faster on a GPU and uses more memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen model's weights."""
    seed: int = 0
    """Seed of the initial weights and the sampling of every variant that does not say otherwise."""
    perplexity: tuple[str, ...] = ()
    """Run folders of `eval.perplexity` over this ablation's selectors, to add to the table."""

    def __post_init__(self) -> None:
        """Refuse variants that there are not, and what cannot be resumed."""
        check_numbers(self)
        for name in self.variants:
            if name not in VARIANTS:
                raise InputError(f"there is no variant '{name}'{nearest(name, VARIANTS)}; see train/ablate.py")
        if self.resume and self.out is None:
            raise InputError("--resume needs the ablation's folder: add --out FOLDER")


Fields = dict[str, Any]  # what differs from the default recipe, by dotted name

_FIT: Fields = {"steps": 1, "optimizer.learning_rate": 1e-9}
_ONE_SUM: Fields = {"hash.sums": 1}
_NETWORKS: Fields = {"hash.form": "asymmetric", "ranking.loss": "pairs", "ranking.target": "both"}
_NETWORKS |= {"optimizer.learning_rate": 3e-3, "steps": 500}
_PER_HEAD: Fields = _NETWORKS | {"ranking.target": "query_head"}
_SYMMETRIC: Fields = _PER_HEAD | {"hash.form": "symmetric", "hash.centre": False}
_FIXED: Fields = {"optimizer.gamma_start": 64.0, "optimizer.anneal": 0.0}
_UNIFORM: Fields = {"ranking.weighting": "uniform", "ranking.always_top": 0}
_PAPER: Fields = _SYMMETRIC | _FIXED | _UNIFORM | {"hash.skip": "none", "hash.code_heads": "query"}
_PAPER |= {"optimizer.learning_rate": 1e-3}

VARIANTS: dict[str, Fields] = {
    "default": {},
    "fit": _FIT,
    "one-sum": _ONE_SUM,
    "one-sum-fit": _ONE_SUM | _FIT,
    "default-64": {"hash.code_bits": 64},
    "default-32": {"hash.code_bits": 32},
    "seed-1": {"seed": 1, "data.seed": 1},
    "window-4096": {"data.window": 4096},
    "steps-50": {"steps": 50},
    "steps-800": {"steps": 800},
    "per-query-head": {"ranking.target": "query_head"},
    "pairs": {"ranking.loss": "pairs", "optimizer.learning_rate": 1e-3},
    "ema": {"optimizer.ema": 0.99},
    "copies": {"data.copies": 0.5},
    "paper": _PAPER,
    "paper-64": _PAPER | {"hash.code_bits": 64},
    "lsh-start": _SYMMETRIC | _FIXED | _UNIFORM,
    "annealed": _SYMMETRIC | _UNIFORM,
    "symmetric": _SYMMETRIC,
    "asymmetric": _NETWORKS,
    "asymmetric-64": _NETWORKS | {"hash.code_bits": 64},
    "asymmetric-group": _NETWORKS | {"ranking.target": "kv_head"},
    "asymmetric-per-head": _PER_HEAD,
    "asymmetric-wide": _NETWORKS | {"hash.hidden": 512},
    "asymmetric-2000": _NETWORKS | {"steps": 2000},
}


def variant_config(name: str, cfg: AblateConfig) -> LayerwiseConfig:
    """Return the training run that a variant is."""
    own: Fields = {"model": cfg.model, "steps": cfg.steps, "dtype": cfg.dtype, "seed": cfg.seed}
    own |= {"layers_at_once": cfg.layers_at_once, "save_every": _NEVER, "measure.every": _NEVER}
    own |= {"ranking.queries_at_once": cfg.queries_at_once, "data.window": cfg.window, "data.train": cfg.train}
    own |= {"data.copies": cfg.copies}
    own |= {"data.held_out": cfg.held_out, "data.held_out_windows": cfg.held_out_windows}
    sections: dict[str, Fields] = {}
    for path, value in (own | VARIANTS[name]).items():
        section, _, field = path.rpartition(".")
        sections.setdefault(section, {})[field] = value
    base, top = PRESETS["default"], sections.pop("")
    kinds = sections.get("hash", {}).get("form", base.hash.form), sections["ranking"].get("loss", base.ranking.loss)
    base = with_recipe(base, *kinds)
    nested = {section: dataclasses.replace(getattr(base, section), **fields) for section, fields in sections.items()}
    return dataclasses.replace(base, **top, **nested)


def command(args: Sequence[str] | None = None) -> int:
    """Run from flags: `python -m train.ablate`."""
    return cli.run(main, AblateConfig, "train.ablate", __doc__ or "", args, runs.stored_by(AblateConfig))


def main(cfg: AblateConfig) -> dict[str, Any]:
    """Train what is not finished, write `ablation.json`, `ablation.md` and `ablation.png`, print the table."""
    use_compile_cache()
    names = cfg.variants or tuple(VARIANTS)
    out = pathlib.Path(cfg.out) if cfg.out else runs.next_free(pathlib.Path("runs"), "ablation")
    if cfg.resume:
        runs.RunFolder(out).check_resumed(cfg, ("out", "resume", "variants", "perplexity"))
    else:
        runs.RunFolder.check_free(out)
    evaluations = [_read_evaluation(pathlib.Path(folder)) for folder in cfg.perplexity]  # before anything is trained
    left = [name for name in names if not (row := _read_row(out / name)) or not row["is_finished"]]
    variants = {name: variant_config(name, cfg) for name in left}
    with runs.hold(out):
        if not cfg.resume:
            runs.RunFolder.create(out, cfg)
        with Display() as display, cli.noted_signals(*cli.STOPPING) as stop:
            _train_together(cfg, variants, out, display, stop)
        rows = [row for name in names if (row := _read_row(out / name))]
        _add_perplexities(rows, evaluations, out)
        _write_table(rows, out)
    print_result({"ablation": str(out), "results": rows})
    if stop:
        told = shlex.join(["python", "-m", "train.ablate", "--resume", "--out", str(out)])
        print(f"stopped; train the rest with: {told}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    return {"results": rows}


def _read_row(folder: pathlib.Path) -> dict[str, Any] | None:
    """Return a variant's row; None where it has none. One that was stopped has a row too."""
    return _read_json(folder / _ROW, "is_finished") if (folder / _ROW).is_file() else None


def _read_evaluation(folder: pathlib.Path) -> dict[str, Any]:
    """Return the summary of a finished evaluation."""
    if not (folder / "summary.json").is_file():
        raise InputError(f"'{folder}' is no finished evaluation (it has no summary.json)")
    return _read_json(folder / "summary.json", "results")


def _read_json(file: pathlib.Path, field: str) -> dict[str, Any]:
    """Return an object that has a field; raises InputError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or field not in found:
        raise InputError(f"'{file}' is damaged: it is no JSON object with '{field}'; remove it to make it again")
    return found


def _train_together(
    cfg: AblateConfig, variants: dict[str, LayerwiseConfig], out: pathlib.Path, display: Display, stop: list[int]
) -> None:
    """Train variants step by step, side by side; those of the same text and seed share their forward passes."""
    groups: dict[tuple[DataConfig, int], dict[str, LayerwiseConfig]] = {}
    for name, variant in variants.items():
        groups.setdefault((variant.data, variant.seed), {})[name] = variant
    lead: Trainer | None = None
    for _, group in sorted(groups.items(), key=lambda item: item[0][0].window != cfg.window):
        trainers: dict[str, Trainer] = {}
        for name, variant in group.items():
            beside = next(iter(trainers.values()), lead)
            inputs = open_inputs(announce(variant, display), display, beside.inputs if beside else None)
            state, folder = first_state(inputs, display), _fresh_folder(out / name, variant)
            trainers[name] = Trainer(inputs, state, folder, display, lead)
            lead = lead or trainers[name]
        if not stop:
            _train_on_windows(trainers, out, display, stop)


def _fresh_folder(path: pathlib.Path, variant: LayerwiseConfig) -> runs.RunFolder:
    """Make the folder of a variant; one that was interrupted is begun anew under the next free name."""
    if path.exists():
        path.rename(runs.next_free(path.parent, f"{path.name}-interrupted"))
    return runs.RunFolder.create(path, variant)


def _train_on_windows(trainers: dict[str, Trainer], out: pathlib.Path, display: Display, stop: list[int]) -> None:
    """Train runs of one feed until each has taken its steps; where a signal stops it, measure them as they are."""
    display.say("compiling")
    with concurrent.futures.ThreadPoolExecutor() as pool:  # into the compilation cache
        list(pool.map(compiled_step_bytes, [trainer.plan for trainer in trainers.values()]))
    feed = next(iter(trainers.values())).inputs.feed
    waiting = dict(trainers)
    for step in range(max(trainer.plan.cfg.steps for trainer in trainers.values())):
        captured = feed.at(step)
        for trainer in waiting.values():
            report = trainer.take_step(captured)
            started = time.monotonic()
            jax.block_until_ready(report)  # each variant's own time; a step's dispatch is in it already
            trainer.seconds += time.monotonic() - started
            trainer.log(trainer.step, report)
        for name in [name for name, trainer in waiting.items() if stop or trainer.step == trainer.plan.cfg.steps]:
            _finish(name, waiting.pop(name), out)
        if stop:
            return


def _finish(name: str, trainer: Trainer, out: pathlib.Path) -> None:
    """Evaluate a trained variant, export it, and write its row."""
    trainer.evaluate()
    summary = write_results(trainer)
    trainer.close()
    row = {"variant": name, "is_finished": trainer.step == trainer.plan.cfg.steps}
    row |= {"bits": trainer.plan.cfg.hash.code_bits, "steps": trainer.step}
    row |= {"window": trainer.plan.cfg.data.window, "seed": trainer.plan.cfg.seed, "seconds": round(trainer.seconds, 1)}
    row |= {"selector": str(out / name / "selector"), "iou_lsh": summary["iou_lsh"], "mass_lsh": summary["mass_lsh"]}
    cfg = trainer.plan.cfg.measure  # per KV head, by probability: evaluated above
    row |= _means(trainer.quality["trained"], "", cfg)
    others: dict[str, EvaluationConfig] = {
        "_scores": dataclasses.replace(cfg, oracle="scores"),
        "_query_head": dataclasses.replace(cfg, per="query_head"),
    }
    for suffix, other in others.items():
        row |= _means(trainer.quality_by(other), suffix, other)
    files.write_json(out / name / _ROW, row)


def _means(quality: SelectionQuality, suffix: str, cfg: EvaluationConfig) -> dict[str, float]:
    """Return IoU, mass and the oracle's mass of one way of selecting, over the layers that select."""
    named = {"iou": quality.iou, "mass": quality.mass, "mass_oracle": quality.oracle_mass}
    return {
        key + suffix: round(mean_over_sparse(np.asarray(value), cfg.dense_layers), 5) for key, value in named.items()
    }


def _add_perplexities(rows: list[dict[str, Any]], evaluations: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """Add perplexities over all texts from evaluations of these selectors, as `ppl_0.02` or `ppl_sinks_0.02`."""
    for found in evaluations:
        metric = "copy" if found["eval"] == "copy" else "ppl"
        for result in found["results"]:
            for row in rows:
                if result["method"] == f"spotlight@{out / row['variant']}" and result["text"] == _ALL_TEXTS:
                    setting = "" if result["setting"] == "bare" else "_sinks"
                    row[f"{metric}{setting}_{result['keep']:g}"] = round(result["ppl"], 4)


_COLUMNS = {
    "variant": "variant",
    "bits": "bits",
    "steps": "steps",
    "window": "window",
    "iou": "IoU with oracle-mass",
    "mass": "mass",
    "iou_scores": "IoU with oracle-scores",
    "iou_query_head": "IoU per query head",
    "mass_query_head": "mass per query head",
    "seconds": "seconds of losses",
}


def _write_table(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Write `ablation.json`, `ablation.md` and `ablation.png`, and print the table."""
    more = sorted({name for row in rows for name in row if name.startswith(("ppl", "copy"))})
    columns = _COLUMNS | {name: name.replace("_", " ") for name in more}
    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    files.write_text(out / "ablation.md", "\n".join(lines) + "\n")
    files.write_json(out / _ROW, rows)
    plot_ablation(out / "ablation.png", rows)
    title = f"{len(rows)} variants, keep {EvaluationConfig.keep:g} (at least {MIN_TOKENS} tokens)"
    print_table(open_console(), make_table(title, list(columns.values()), cells))
    methods = " ".join(f"spotlight@{out / row['variant']}" for row in rows)
    keeps = " ".join(f"{keep:g}" for keep in _KEEPS)
    flags = f"--settings bare sinks --keep {keeps} --methods dense oracle-scores {methods}"
    print(f"perplexities: spotlight eval perplexity {flags}")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(command())
