"""Pictures of evaluations: quality against bytes read, and quality by layer and head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.axis
import numpy as np
from jaxtyping import Float

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

_MIB = 2**20
_PANELS = 5  # heat maps in a row
# a method looks the same in every picture
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#444444", "linestyle": "--"},
    "oracle": {"color": "#444444", "linestyle": ":", "marker": "*"},
    "oracle-kv": {"color": "#777777", "linestyle": ":", "marker": "*"},
    "oracle-query": {"color": "#999999", "linestyle": ":", "marker": "P"},
    "spotlight": {"color": "#1f6f8b", "marker": "o", "linewidth": 2.4},
    "lsh": {"color": "#b5651d", "marker": "s"},
    "lsh-centred": {"color": "#d08c4a", "marker": "s", "linestyle": "--"},
    "lsh-gaussian": {"color": "#8c4a10", "marker": "D"},
    "lsh-gaussian-centred": {"color": "#c9a27a", "marker": "D", "linestyle": "--"},
    "quest": {"color": "#7a9e3a", "marker": "^"},
    "magicpig": {"color": "#a63d6d", "marker": "X", "linestyle": "none", "markersize": 9},
    "window": {"color": "#6f5fa3", "marker": "v"},
    "random": {"color": "#b0b0b0", "marker": "x"},
    "binary": {"color": "#3aa394", "marker": "h"},
}


def plot_tradeoff(path: Path, rows: Sequence[dict[str, Any]], metric: str, label: str, title: str) -> None:
    """A metric against the bytes that a token reads: a panel a setting, a line a method through its shares."""
    settings = list(dict.fromkeys(row["setting"] for row in rows if row["method"] in _budgeted(rows)))
    settings = settings or [rows[0]["setting"]]
    figure, axes = plt.subplots(
        1,
        len(settings),
        figsize=(1.8 + 5.4 * len(settings), 4.6),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            own = [row for row in own if row["setting"] == setting or method not in _budgeted(rows)]
            own.sort(key=lambda row: row["bytes_read"])
            style = STYLES.get(method, {"marker": "."})
            if method == "dense":
                axis.axhline(own[0][metric], label=_name_dense(own[0]), **style)
                continue
            axis.plot([row["bytes_read"] / _MIB for row in own], [row[metric] for row in own], label=method, **style)
        axis.set(title=setting, xlabel="keys, values and index read per token, all layers (MiB)", xscale="log")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    for axis in axes[0]:
        _tick_logarithms(axis.xaxis)
        _tick_logarithms(axis.yaxis)
    axes[0][0].set_ylabel(label)
    figure.suptitle(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _tick_logarithms(side: matplotlib.axis.Axis) -> None:
    """Round numbers on a logarithmic axis, however short or long it is."""
    least, greatest = side.get_view_interval()
    short = matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    long = matplotlib.ticker.LogLocator(subs=[1, 1.5, 2, 3, 5, 7])
    side.set_major_locator(long if greatest > 3 * least else short)
    side.set_minor_locator(matplotlib.ticker.NullLocator())
    side.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _budgeted(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Methods whose rows differ by share or setting."""
    return {row["method"] for row in rows if row["keep"] is not None and row["method"] != "dense"}


def _name_dense(row: dict[str, Any]) -> str:
    return f"dense ({row['bytes_read'] / _MIB:.3g} MiB)"


def plot_heads(
    path: Path, panels: Sequence[tuple[str, Float[np.ndarray, "layers heads"]]], label: str, head: str, title: str
) -> None:
    """Quality of each layer and head, a panel a method, one colour scale; grey (NaN) where a layer reads densely."""
    layers, heads = panels[0][1].shape
    highest = max(max(float(np.nanmax(values)) for _, values in panels), 1e-3)
    rows = -(-len(panels) // _PANELS)
    columns = -(-len(panels) // rows)
    width, height = min(0.32 * heads, 5.0) + 1.2, max(2.6, 0.14 * layers) + 0.7
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(6.0, columns * width + 1.2), rows * height),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, values) in zip(axes.flat, panels, strict=False):
        image = axis.imshow(values, vmin=0, vmax=highest, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_facecolor("#d0d0d0")
        axis.set_title(f"{name}\nmean {np.nanmean(values):.3f}")
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        axis.set_yticks(range(0, layers, max(1, layers // 10)))
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel(head)
    figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
