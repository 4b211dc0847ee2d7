"""Pictures of evaluations: quality against bytes read, and quality by layer and head."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.axis
import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.common.by_position import buckets_of
from eval.common.cases import describe_selection
from eval.common.labels import name_methods, style_methods
from spotlight_jax.files import replace_file

_MIB = 2**20
_PANELS = 5  # heat maps in a row
_FAR = 4.0  # times the median of a metric: what lies further is off the axis
_TITLE, _SMALL = 12.0, 9.0  # font sizes


def plot_tradeoff(path: Path, rows: Sequence[dict[str, Any]], metric: str, label: str, title: str) -> None:
    """Draw a metric that is better low against the bytes that a token reads: a panel a setting, a line a method.

    Where a method is so far off that others could not be distinguished, the axis ends before it; the legend says so.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names, styles = name_methods(methods), style_methods(methods)
    settings = list(dict.fromkeys(row["setting"] for row in rows if row["method"] in _budgeted(rows)))
    settings = settings or [rows[0]["setting"]]
    size = 4.4 + 5.4 * len(settings), max(4.8, 1.2 + 0.23 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(settings), sharex=True, sharey=True, squeeze=False)
    end = find_end([row[metric] for row in rows if row["method"] != "dense"] or [row[metric] for row in rows])
    for axis, setting in zip(axes[0], settings, strict=True):
        for method in methods:
            points = [row for row in rows if row["method"] == method]
            line_label = names[method] + describe_outside([row[metric] for row in points], end)
            points = [row for row in points if row["setting"] == setting or method not in _budgeted(rows)]
            points.sort(key=lambda row: row["bytes_read"])
            if method == "dense":
                axis.axhline(points[0][metric], label=_name_dense(points[0]), **styles[method])
                continue
            x, y = [row["bytes_read"] / _MIB for row in points], [row[metric] for row in points]
            axis.plot(x, y, label=line_label, **styles[method])
        axis.set(title=setting, xlabel="keys, values and index read per token, all layers (MiB)", xscale="log")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    _end_axis(axes[0][0], [row[metric] for row in rows], end)
    for axis in axes[0]:
        _tick_logarithms(axis.xaxis)
        _tick_logarithms(axis.yaxis)
    axes[0][0].set_ylabel(label)
    set_title(figure, title)
    # of the last panel, so that the layout keeps it apart from the title
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_positions(
    path: Path, rows: Sequence[dict[str, Any]], labels: Mapping[str, str], title: str, is_low_better: bool = False
) -> None:
    """Draw measures by position in the sequence: a panel a measure, a line a method with its first share and setting.

    Args:
        rows: with `by_position`, as `eval.common.by_position` makes it.
        labels: of the measures, by their names.
        is_low_better: a method that is far off then leaves the axis, as in `plot_tradeoff`.
    """
    first = {row["method"]: row for row in reversed(rows)}
    names, styles = name_methods(row["method"] for row in rows), style_methods(row["method"] for row in rows)
    size = 4.0 + 5.4 * len(labels), max(4.8, 1.2 + 0.23 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)
    for axis, (measure, label) in zip(axes[0], labels.items(), strict=True):
        lines = {method: [bucket[measure] for bucket in buckets_of(first[method])] for method in names}
        every = [value for line in lines.values() for value in line]
        end = find_end(every) if is_low_better else math.inf
        for method, line in lines.items():
            buckets = buckets_of(first[method])
            middles = [(bucket["from"] + bucket["to"]) / 2 for bucket in buckets]
            line_label = (
                names[method] + describe_selection(first[method]).replace("\n", ", ") + describe_outside(line, end)
            )
            axis.plot(middles, line, label=line_label, **styles[method])
        ends = [0, *(bucket["to"] for bucket in buckets)]
        axis.set(
            xlabel="position in the sequence", ylabel=label, xlim=(0, ends[-1]), xticks=ends[:: -(-len(ends) // 9)]
        )
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if is_low_better:
            axis.set_yscale("log")
            _end_axis(axis, every, end)
            _tick_logarithms(axis.yaxis)
        else:
            axis.set_ylim(0, 1.06 * max(every))  # a little above the highest mark
    set_title(figure, title)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def find_end(values: Sequence[float]) -> float:
    """Return where an axis of values that are better low ends, at most: some times the (lower) median."""
    return _FAR * statistics.median_low(values)


def describe_outside(values: Sequence[float], end: float) -> str:
    """Return what a legend adds to the name of a method with values beyond the axis' end."""
    least, greatest = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (min(values), max(values)))
    if max(values) <= end:
        return ""
    if min(values) <= end:
        return f" (up to {greatest})"
    return f" (off: {least})" if least == greatest else f" (off: {least} to {greatest})"


def _end_axis(axis: Axes, values: Sequence[float], end: float) -> None:
    """End a logarithmic axis just above the greatest value that is not beyond `end`."""
    inside = [value for value in values if value <= end]
    margin = max(max(inside) / min(inside), 1.01) ** 0.05
    axis.set_ylim(min(inside) / margin, max(inside) * margin)


def set_title(figure: Figure, title: str) -> None:
    """Write a title above all panels, in as many lines as it needs."""
    figure.suptitle(wrap(title, figure.get_figwidth(), _TITLE), fontsize=_TITLE)


def wrap(text: str, width: float, size: float) -> str:
    """Break a text into lines that fit.

    Args:
        width: inches.
        size: of the font, points.
    """
    characters = int(72 * width / (0.6 * size))
    return textwrap.fill(text, max(8, characters))


def _tick_logarithms(side: matplotlib.axis.Axis) -> None:
    """Put round numbers on a logarithmic axis, however short or long it is."""
    least, greatest = side.get_view_interval()
    short = matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    long = matplotlib.ticker.LogLocator(subs=[1, 1.5, 2, 3, 5, 7])
    side.set_major_locator(long if greatest > 3 * least else short)
    side.set_minor_locator(matplotlib.ticker.NullLocator())
    side.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _budgeted(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Return the methods with rows that differ by share or setting."""
    return {row["method"] for row in rows if row["keep"] is not None and row["method"] != "dense"}


def _name_dense(row: dict[str, Any]) -> str:
    return f"dense ({row['bytes_read'] / _MIB:.3g} MiB)"


def plot_heads(
    path: Path,
    panels: Sequence[tuple[str, Float[np.ndarray, "layers heads"]]],
    label: str,
    head: str,
    title: str,
    end: float = math.inf,
) -> None:
    """Draw the quality of layers and heads, a panel a method, one colour scale; grey (NaN): a layer read densely.

    The scale goes to the highest of all, or to `end`.
    """
    layers, heads = panels[0][1].shape
    highest = min(max(max(float(np.nanmax(values)) for _, values in panels), 1e-3), end)
    rows = -(-len(panels) // _PANELS)
    columns = -(-len(panels) // rows)
    width, height = min(0.32 * heads, 5.0) + 1.2, max(2.6, 0.14 * layers) + 0.7
    figure = Figure(figsize=(max(6.0, columns * width + 1.2), rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, values) in zip(axes.flat, panels, strict=False):
        image = axis.imshow(values, vmin=0, vmax=highest, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_facecolor("#d0d0d0")
        axis.set_title(f"{wrap(name, width, _SMALL)}\nmean {np.nanmean(values):.3f}", fontsize=_SMALL)
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        axis.set_yticks(range(0, layers, max(1, layers // 10)))
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel(head)
    figure.colorbar(image, ax=axes, label=label)
    set_title(figure, title)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
