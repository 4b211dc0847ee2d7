import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from train.plots import plot_curves, plot_layers

SUMMARY = {"keep": 0.02, "share_read": 0.021, "code_bits": 64, "iou_lsh": 0.3, "mass_lsh": 0.7}
SUMMARY |= {"mass_oracle": 0.9, "oracle": "oracle-mass"}


@pytest.fixture(autouse=True)
def nothing_is_shown():
    """Pictures are drawn apart from pyplot: a notebook's figures and its way to show them stay as they are."""
    before = matplotlib.rcParams["backend"]
    yield
    assert not plt.get_fignums() and matplotlib.rcParams["backend"] == before


def _is_picture(path):
    pixels = plt.imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels[..., :3].std() > 0.01


@pytest.mark.parametrize(("loss", "tail", "drawn"), [("pairs", (), 4), ("mass", (), 3), ("mass", (0.4, 0.1), 4)])
def test_curves_are_drawn_from_rows_of_both_kinds(tmp_path, monkeypatch, loss, tail, drawn):
    """Pairs that are ranked wrongly have an axis of their own, where there are any, and so has the tail."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args, **how: (figures.append(len(args[0].axes)), save(*args, **how)))
    rows = [{"step": 0, "iou": 0.3, "mass": 0.7}]
    rows += [{"step": step, "loss": 1 / step, "wrong": 0.1 / step} for step in (1, 2, 3)]
    rows.append({"step": 3, "iou": 0.4, "mass": 0.8})
    plot_curves(tmp_path / "curves.png", rows, SUMMARY | {"output_error": 0.5}, loss, tail)
    assert figures == [drawn]
    assert _is_picture(tmp_path / "curves.png")


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (80, 64)])
def test_layers_of_any_model_are_drawn(tmp_path, shape):
    values = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    plot_layers(tmp_path / "layers.png", values, values / 2, "KV head", range(shape[0]), "oracle-mass")
    assert _is_picture(tmp_path / "layers.png")


def test_the_means_of_layers_are_over_the_sparse_ones_as_in_the_table(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: titles.extend(axis.get_title() for axis in figure.axes[:2])
    )
    iou = np.array([[0.9, 0.7], [0.2, 0.4], [0.4, 0.6]])  # layer 0 is read densely
    plot_layers(tmp_path / "layers.png", iou, iou / 2, "KV head", [1, 2], "oracle-mass")
    assert titles == ["orthogonal LSH\nmean 0.200 of 2 sparse layers", "trained\nmean 0.400 of 2 sparse layers"]
