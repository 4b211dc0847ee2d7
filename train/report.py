"""The end of a run: its selector, its pictures, its summary, its table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from spotlight_jax import runs
from spotlight_jax.checkpoint import Selector, save_selector
from spotlight_jax.display import make_table, print_table
from spotlight_jax.memory import GIB
from spotlight_jax.metrics import spread_positions
from spotlight_jax.selection import MIN_TOKENS, share_read
from train.measure import ORACLES
from train.plots import plot_curves, plot_layers
from train.session import Session
from train.step import gather_state


def summarise(session: Session, selector: str) -> dict[str, Any]:
    """The numbers of a run, for people and programs."""
    cfg = session.cfg
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
        "iou": session.mean("iou"),
        "iou_lsh": session.mean("iou", "lsh"),
        "mass": session.mean("mass"),
        "mass_lsh": session.mean("mass", "lsh"),
        "mass_oracle": session.mean("oracle_mass"),
        "steps": cfg.steps,
        "seconds": session.seconds,
        "tokens_per_second": tokens / max(session.seconds, 1e-9),
        "selector": selector,
    }
    stats = jax.devices()[0].memory_stats()
    if stats:  # a CPU keeps none
        summary["peak_gib"] = stats["peak_bytes_in_use"] / GIB
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in summary.items()}


def write_results(session: Session, folder: runs.RunFolder) -> dict[str, Any]:
    """Export the selector, draw the pictures, write the summary."""
    path = folder.path / "selector"
    summary = summarise(session, str(path))
    selector = Selector(
        cfg=session.cfg.hash,
        shape=session.shape,
        params=jax.tree.map(jnp.asarray, jax.device_get(gather_state(session.state, session.shape.layers).selector)),
        base_model=session.cfg.model,
        info={"recipe": runs.to_plain(session.cfg), "metrics": summary},
    )
    save_selector(path, selector, _card(session, summary))
    plot_curves(folder.path / "curves.png", folder.metrics(), summary, session.cfg.ranking.loss)
    head = "KV head" if session.cfg.measure.per == "kv_head" else "query head"
    trained, lsh = (np.asarray(session.quality[name].iou) for name in ("trained", "lsh"))
    sparse = [layer for layer in range(session.shape.layers) if layer not in session.cfg.measure.dense_layers]
    plot_layers(folder.path / "layers.png", trained, lsh, head, sparse, summary["oracle"])
    folder.write_summary(summary)
    return summary


def print_results(
    console: rich.console.Console, session: Session, summary: dict[str, Any], folder: runs.RunFolder
) -> None:
    """The table a person reads at the end."""
    rows = [
        [f"orthogonal LSH, {summary['code_bits']} bits", _cell(summary["iou_lsh"]), _cell(summary["mass_lsh"])],
        [f"trained, {summary['code_bits']} bits", _cell(summary["iou"]), _cell(summary["mass"])],
        [summary["oracle"], _cell(1.0), _cell(summary["mass_oracle"])],
    ]
    if "start" in session.quality:
        start = ["before training", _cell(session.mean("iou", "start")), _cell(session.mean("mass", "start"))]
        rows.insert(1, start)
    title = f"held-out text, windows of {summary['window']} tokens, {describe_share(summary)}"
    print_table(console, make_table(title, ["selection", f"IoU with {summary['oracle']}", "attention mass read"], rows))
    speed = f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s"
    console.print(
        f"{speed}; pictures: {folder.path}/curves.png, {folder.path}/layers.png", markup=False, soft_wrap=True
    )


def describe_share(summary: dict[str, Any]) -> str:
    """What was asked for, and what was read: more where the least number of tokens is more than the share."""
    read = f"{100 * summary['share_read']:.1f} % of the cached tokens read"
    return f"{read} (keep {summary['keep']:g}, at least {MIN_TOKENS} tokens)"


def _cell(value: float) -> str:
    return f"{value:.3f}"


def _card(session: Session, summary: dict[str, Any]) -> str:
    """The model card beside an exported selector."""
    cfg, shape = session.cfg, session.shape
    return f"""# Selector for {cfg.model}

Hash functions that choose which cached tokens each attention head reads, trained with spotlight-jax:
{cfg.hash.form} form, {cfg.hash.code_bits} bits per {"KV" if cfg.hash.code_heads == "kv" else "query"} head and token.
The base model is not changed and not included.

- base model: {cfg.model}: {shape.layers} layers, {shape.q_heads} query / {shape.kv_heads} KV heads x {shape.head_dim}
- training text: {", ".join(cfg.data.train)}, {summary["steps"]} steps, windows of {cfg.data.window} tokens
- held-out text, {describe_share(summary)}, bare (no sinks, no recent tokens):

| | IoU with {summary["oracle"]} | attention mass read |
|---|---|---|
| orthogonal LSH, same bits | {summary["iou_lsh"]:.3f} | {summary["mass_lsh"]:.3f} |
| this selector | {summary["iou"]:.3f} | {summary["mass"]:.3f} |
| {summary["oracle"]} | 1 | {summary["mass_oracle"]:.3f} |

Use: `spotlight generate --model {cfg.model} --selector THIS_FOLDER --prompt-file book.txt`

Files: `config.json` (base model, sizes, hash functions, recipe, metrics), `selector.safetensors`, and the same arrays
through Orbax in `orbax/`.
"""
