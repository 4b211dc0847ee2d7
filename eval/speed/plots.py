"""Pictures of `eval.speed`: microseconds by length, and tokens per second by length and batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spotlight_jax.files import replace_file

Row = dict[str, Any]

# what is drawn of the operations, and how: the others are in the table
_SHOWN = {
    "sparse layer": ("#1f6f8b", "-"),
    "sparse layer, Hamming": ("#63a6bd", "-"),
    "score + select": ("#7a9e3a", "-"),
    "score + lax.top_k": ("#c9a227", "--"),
    "score": ("#9a9a9a", "-"),
    "attend": ("#8a5a9e", "-"),
}
_DENSE = ("#b5651d", "#d9a679", "#8c3b1a", "#e0c9a6")


def _by_length(axes: Axes, lengths: Sequence[int]) -> None:
    """Make an axis logarithmic, its ticks the lengths."""
    axes.set_xscale("log", base=2)
    names = [f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}" for length in lengths]
    axes.set_xticks(list(lengths), names, minor=False)
    axes.minorticks_off()
    axes.set_xlabel("cached tokens")
    axes.grid(alpha=0.25, which="both")


def _line(axes: Axes, rows: Sequence[Row], label: str, color: str, style: str = "-") -> None:
    """Draw medians with their range."""
    x, y = [row["length"] for row in rows], [row["seconds"] * 1e6 for row in rows]
    axes.plot(x, y, style, marker="o", ms=3.5, color=color, label=label)
    axes.fill_between(x, [r["least"] * 1e6 for r in rows], [r["greatest"] * 1e6 for r in rows], color=color, alpha=0.15)


def plot_ops(path: Path, rows: Sequence[Row], title: str) -> None:
    """Time of each operation by length, one panel a batch, with the floors of the layers."""
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(1.5 + 5.5 * len(batches), 5.2), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        some = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["length"])
        dense = [op for op in dict.fromkeys(row["op"] for row in some) if op.startswith("dense")]
        styles = {op: (color, "-") for op, color in zip(dense, _DENSE, strict=False)} | _SHOWN
        for op, (color, style) in styles.items():
            if line := [row for row in some if row["op"] == op and row["seconds"] > 0]:
                _line(axes, line, op, color, style)
        for op, (color, _) in styles.items():
            line = [row for row in some if row["op"] == op]
            if not line or op not in (*dense[:1], "sparse layer"):
                continue
            floors = [row["floor_seconds"] * 1e6 for row in line]
            axes.plot([row["length"] for row in line], floors, ":", color=color, label=f"floor of {op}")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch}")
        _by_length(axes, sorted({row["length"] for row in some}))
    panels[0][0].set_ylabel("time per layer (µs), median and range")
    figure.suptitle(title)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_decode(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw tokens per second of dense and sparse decoding, a pair of bars for each length and batch."""
    points = list(dict.fromkeys((row["length"], row["batch"]) for row in rows))
    figure = Figure(figsize=(max(5.0, 1.6 + 1.1 * len(points)), 4.4), layout="constrained")
    axes = figure.subplots()
    for place, (method, color) in enumerate((("dense", _DENSE[0]), ("spotlight", "#1f6f8b"))):
        some = {(row["length"], row["batch"]): row for row in rows if row["method"] == method}
        x = [spot + 0.4 * (place - 0.5) for spot, point in enumerate(points) if point in some]
        bars = axes.bar(x, [row["tokens_per_second"] for row in some.values()], 0.38, color=color, label=method)
        axes.bar_label(
            bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}", fontsize=8, padding=2
        )
        floors = [row["batch"] / row["floor_seconds"] for row in some.values()]
        axes.plot(x, floors, "_", ms=18, color=color, label=f"bandwidth's bound, {method}")
    axes.set_xticks(range(len(points)), [f"{length:,}\nbatch {batch}" for length, batch in points])
    axes.set(xlabel="cached tokens of each sequence", ylabel="tokens/s, all sequences together", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


PLOTS: dict[str, Callable[[Path, Sequence[Row], str], None]] = {"op": plot_ops, "decode": plot_decode}
