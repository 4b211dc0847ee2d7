"""Pictures of a run: curves over the steps, and quality by layer and head."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from spotlight_jax.files import replace_file

_LEARNED, _LSH, _ORACLE, _PLAIN = "#1f6f8b", "#b5651d", "#444444", "#7a9e3a"


def plot_curves(
    path: pathlib.Path,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    loss: str,
    tail: Sequence[float] = (),
) -> None:
    """Draw `curves.png`: loss (and wrongly ranked pairs), IoU, captured mass, each with its baselines.

    Args:
        path: of the picture.
        rows: of the run's metrics.
        summary: of the run.
        loss: its kind.
        tail: error of the outputs at each step of the tail's corrections, if there are any: a panel of its own.
    """
    steps = [row for row in rows if "loss" in row]
    measured = [row for row in rows if "iou" in row]
    panels = 4 if len(tail) else 3
    figure = Figure(figsize=(4.3 * panels, 3.8), layout="constrained")
    left, middle, right, *last = figure.subplots(1, panels)
    for axes in last:
        axes.plot(range(len(tail)), tail, color=_LEARNED)
        axes.axhline(summary["output_error"], color=_PLAIN, ls="--", label="without the tail")
        axes.set(xlabel="step of its corrections", ylabel="squared error, relative", title="Attention output's error")
        axes.set(yscale="log")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25, which="both")
    x = [row["step"] for row in steps]
    left.plot(x, [row["loss"] for row in steps], color=_LEARNED, label="ranking loss")
    what = "ranking loss" if loss == "pairs" else "attention mass missed"
    left.set(xlabel="step", ylabel=f"{what}, mean over layers", title="Training", ylim=(0, None))
    if loss == "pairs":
        twin = left.twinx()
        twin.plot(x, [100 * row["wrong"] for row in steps], color=_PLAIN, label="wrongly ranked pairs")
        twin.set(ylabel="wrongly ranked pairs (%)", ylim=(0, None))
        lines = [*left.get_lines(), *twin.get_lines()]
        left.legend(lines, [str(line.get_label()) for line in lines], loc="lower center", frameon=False)
    at = [row["step"] for row in measured]
    keep = f"keep {summary['keep']:g} ({100 * summary['share_read']:.1f} % read)"
    middle.plot(at, [row["iou"] for row in measured], "o-", color=_LEARNED, label="trained")
    middle.axhline(summary["iou_lsh"], color=_LSH, ls="--", label=f"orthogonal LSH, {summary['code_bits']} bits")
    middle.set(xlabel="step", ylabel=f"IoU with {summary['oracle']}", title=f"Held-out overlap\nat {keep}")
    right.plot(at, [row["mass"] for row in measured], "o-", color=_LEARNED, label="trained")
    right.axhline(summary["mass_lsh"], color=_LSH, ls="--", label=f"orthogonal LSH, {summary['code_bits']} bits")
    right.axhline(summary["mass_oracle"], color=_ORACLE, ls=":", label=summary["oracle"])
    right.set(xlabel="step", ylabel="attention probability read", title=f"Held-out attention mass\nat {keep}")
    for axes in (middle, right):
        axes.margins(y=0.15)
        axes.grid(alpha=0.25)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_layers(
    path: pathlib.Path,
    iou: Float[np.ndarray, "layers heads"],
    lsh: Float[np.ndarray, "layers heads"],
    head: str,
    sparse: Sequence[int],
    oracle: str,
) -> None:
    """Draw `layers.png`: IoU of each layer and head, LSH on the left, trained on the right, one colour scale.

    Args:
        path: of the picture.
        iou: of the trained hash functions.
        lsh: of LSH.
        head: what a column is.
        sparse: layers that decoding reads sparsely, over which the means are, as in the table.
        oracle: whose choice the overlap is with.
    """
    highest = max(float(iou.max()), float(lsh.max()), 1e-3)
    height = max(3.5, 0.16 * iou.shape[0] + 1.2)
    width = max(6.0, 2 * min(0.35 * iou.shape[1], 6.0) + 2.5)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values, title in ((axes[0], lsh, "orthogonal LSH"), (axes[1], iou, "trained")):
        image = axis.imshow(values, vmin=0, vmax=highest, aspect="auto", cmap="viridis", interpolation="nearest")
        mean = f"mean {values[list(sparse)].mean():.3f} of {len(sparse)} sparse layers"
        axis.set_title(f"{title}\n{mean}", fontsize="medium")  # two stand side by side over few heads
        axis.set_xlabel(head)
        axis.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=f"IoU with {oracle}, held-out text")
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_ablation(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Draw `ablation.png`: overlap and captured mass of every variant, with the oracle's and LSH's."""
    names, places = [str(row["variant"]) for row in rows], np.arange(len(rows))
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric, label in ((left, "iou", "IoU with oracle-mass"), (right, "mass", "attention mass read")):
        axes.barh(places, [row[metric] for row in rows], color=_LEARNED, height=0.65)
        axes.plot([row[f"{metric}_lsh"] for row in rows], places, "|", ms=14, mew=2, color=_LSH, label="orthogonal LSH")
        for place, row in zip(places, rows, strict=True):
            axes.annotate(
                f"{row[metric]:.3f}", (0, place), (4, 0), textcoords="offset points", va="center", color="white"
            )
        axes.set(xlabel=label)
        axes.grid(axis="x", alpha=0.25)
    right.plot([row["mass_oracle"] for row in rows], places, "|", ms=14, mew=2, color=_ORACLE, label="oracle-mass")
    left.set_yticks(places, names)
    left.invert_yaxis()
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
