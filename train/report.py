"""The end of a run: its selector, its pictures, its summary, its table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from spotlight_jax.display import make_table, print_table
from spotlight_jax.memory import GIB
from spotlight_jax.metrics import spread_positions
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.card import describe_share, write_card
from spotlight_jax.selector.checkpoint import save_selector
from spotlight_jax.selector.selection import share_read
from train.config import ORACLES
from train.plots import plot_curves, plot_layers
from train.processes import fetch
from train.trainer import Trainer, make_selector


def summarise(trainer: Trainer, selector: str) -> dict[str, Any]:
    """Return the numbers of a run, for people and programs."""
    cfg = trainer.plan.cfg
    tokens = -(-cfg.steps // cfg.steps_per_window) * cfg.data.window
    summary: dict[str, Any] = {
        "model": cfg.model,
        "preset": cfg.preset,
        "code_bits": cfg.hash.code_bits,
        "keep": cfg.measure.keep,
        "share_read": share_read(spread_positions(cfg.data.window, cfg.measure.queries) + 1, cfg.measure.selection),
        "per": cfg.measure.per,
        "oracle": ORACLES[cfg.measure.oracle],
        "window": cfg.data.window,
        "length": trainer.plan.length,
        "lengths": list(trainer.plan.lengths),
        "iou": trainer.mean("iou"),
        "iou_lsh": trainer.mean("iou", "lsh"),
        "mass": trainer.mean("mass"),
        "mass_lsh": trainer.mean("mass", "lsh"),
        "mass_oracle": trainer.mean("oracle_mass"),
        "steps": cfg.steps,
        "seconds": trainer.seconds,
        "tokens_per_second": tokens / max(trainer.seconds, 1e-9),
        "selector": selector,
    }
    if "far" in trainer.quality:
        summary |= {
            "length_windows": "whole" if trainer.is_far_whole else "short, with positions up to the length",
            "iou_at_length": trainer.mean("iou", "far"),
            "iou_lsh_at_length": trainer.mean("iou", "far_lsh"),
            "mass_at_length": trainer.mean("mass", "far"),
            "mass_lsh_at_length": trainer.mean("mass", "far_lsh"),
            "mass_oracle_at_length": trainer.mean("oracle_mass", "far"),
        }
    stats = jax.local_devices()[0].memory_stats()
    if stats:  # a CPU keeps none
        summary["peak_gib"] = stats["peak_bytes_in_use"] / GIB
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in summary.items()}


def write_results(trainer: Trainer) -> dict[str, Any]:
    """Export the selector, draw the pictures, write the summary."""
    folder = trainer.folder
    path = folder.path / "selector"
    trainer.evaluate_length()
    sets = [_on_host(trainer, length) for length in trainer.plan.lengths]
    summary, curve = summarise(trainer, str(path)), []
    if trainer.plan.cfg.tail.windows:
        tail = trainer.fit_tails(sets)
        sets, curve = tail.sets, tail.curve
        summary |= {"output_error": round(tail.before, 5), "output_error_with_tail": round(tail.after, 5)}
    selector = make_selector(trainer.plan, sets, metrics=summary)
    if not folder.is_written:
        return summary
    save_selector(path, selector, write_card(selector))
    plot_curves(folder.path / "curves.png", folder.metrics(), summary, trainer.plan.cfg.ranking.loss, curve)
    head = "KV head" if trainer.plan.cfg.measure.per == "kv_head" else "query head"
    trained, lsh = (np.asarray(trainer.quality[name].iou) for name in ("trained", "lsh"))
    sparse = [layer for layer in range(trainer.plan.shape.layers) if layer not in trainer.plan.cfg.measure.dense_layers]
    plot_layers(folder.path / "layers.png", trained, lsh, head, sparse, summary["oracle"])
    folder.write_summary(summary)
    return summary


def _on_host(trainer: Trainer, length: int) -> HashFunctions:
    """Return the hash functions for sequences of `length` tokens, apart from the training state."""
    return jax.tree.map(jnp.asarray, fetch(trainer.hash_functions(length)))


def print_results(console: rich.console.Console, trainer: Trainer, summary: dict[str, Any]) -> None:
    """Print the table that a person reads at the end."""
    start = []
    if trainer.before is not None:
        start = [["before training", _cell(trainer.before["iou"]), _cell(trainer.before["mass"])]]
    bits, oracle = summary["code_bits"], summary["oracle"]
    columns = ["selection", f"IoU with {oracle}", "attention mass read"]
    title = f"held-out text, windows of {summary['window']} tokens, {describe_share(summary)}"
    print_table(console, make_table(title, columns, _quality_rows(summary, bits, oracle, *start)))
    if "iou_at_length" in summary:
        far = {name.removesuffix("_at_length"): value for name, value in summary.items() if name.endswith("_at_length")}
        length = summary["length"]
        kind = f"windows of {length:,} tokens, their last quarter"
        if not trainer.is_far_whole:
            kind = f"positions that jump to {length:,}"
        title = f"at the far end of the context: {kind}"
        print_table(console, make_table(title, columns, _quality_rows(far, bits, oracle)))
    if "output_error" in summary:
        before, after = (f"{summary[name]:.3g}" for name in ("output_error", "output_error_with_tail"))
        line = f"error of attention outputs (squared, relative): {before} without the tail, {after} with it"
        console.print(line, markup=False, soft_wrap=True)
    speed = f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s"
    console.print(
        f"{speed}; pictures: {trainer.folder.path}/curves.png, {trainer.folder.path}/layers.png",
        markup=False,
        soft_wrap=True,
    )


def _quality_rows(found: dict[str, Any], bits: int, oracle: str, *between: list[str]) -> list[list[str]]:
    """Return rows of LSH, of what lies between, of the trained selector and of the oracle."""
    return [
        [f"orthogonal LSH, {bits} bits", _cell(found["iou_lsh"]), _cell(found["mass_lsh"])],
        *between,
        [f"trained, {bits} bits", _cell(found["iou"]), _cell(found["mass"])],
        [oracle, _cell(1.0), _cell(found["mass_oracle"])],
    ]


def describe_far(summary: dict[str, Any]) -> str | None:
    """Return a sentence on quality at the far end of the context; None where that is no farther than a window's."""
    if "mass_at_length" not in summary:
        return None
    trained, lsh, oracle = (_cell(summary[f"mass{name}_at_length"]) for name in ("", "_lsh", "_oracle"))
    return (
        f"At the far end of {summary['length']:,} positions the selector reads {trained} of the attention mass "
        f"(LSH {lsh}, {summary['oracle']} {oracle})."
    )


def _cell(value: float) -> str:
    return f"{value:.3f}"
