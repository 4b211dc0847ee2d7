"""The map of a haystack: a square for every length and depth, a panel for every method."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.colors
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from eval.common.pictures import set_title, wrap
from spotlight_jax.files import replace_file


@dataclasses.dataclass(frozen=True)
class Panel:
    """One method's squares."""

    name: str
    values: Float[np.ndarray, "depths lengths"]


def plot_grids(
    path: Path, panels: Sequence[Panel], lengths: Sequence[int], depths: Sequence[float], label: str, title: str
) -> None:
    """Write the picture: shares on a scale from 0 to 1, perplexities (`label` says which) on a logarithmic one."""
    is_share = "perplexity" not in label
    highest = max(float(panel.values.max()) for panel in panels)
    lowest = min(float(panel.values.min()) for panel in panels)
    norm = (
        matplotlib.colors.Normalize(0, 1) if is_share else matplotlib.colors.LogNorm(lowest, max(highest, lowest + 1))
    )
    colours = matplotlib.colormaps["viridis" if is_share else "viridis_r"]
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    width, height = 0.62 * len(lengths) + 0.9, 0.42 * len(depths) + 1.0
    size = max(6.0, columns * width + 1.6), max(3.2, rows * height + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        image = axis.imshow(panel.values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        axis.set_title("\n".join(wrap(line, width, 9.0) for line in panel.name.split("\n")), fontsize=9)
        for (row, column), value in np.ndenumerate(panel.values):
            text = f"{value:.0%}" if is_share else f"{value:.3g}"
            is_dark = np.mean(colours(norm(value))[:3]) < 0.55
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    figure.supxlabel("length of the whole (tokens)", fontsize=9)
    figure.supylabel("depth in the haystack", fontsize=9)
    set_title(figure, title)
    figure.colorbar(image, ax=axes, label=label)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
