import matplotlib.pyplot as plt
import numpy as np
import pytest

from train.plots import plot_curves, plot_layers

SUMMARY = {"keep": 0.02, "code_bits": 64, "iou_lsh": 0.3, "mass_lsh": 0.7, "mass_oracle": 0.9}


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert not plt.get_fignums()


def _is_picture(path):
    pixels = plt.imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels[..., :3].std() > 0.01


@pytest.mark.parametrize(("loss", "drawn"), [("pairs", 4), ("mass", 3)])
def test_curves_are_drawn_from_rows_of_both_kinds(tmp_path, monkeypatch, loss, drawn):
    """Pairs that are ranked wrongly have an axis of their own, where there are any."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (figures.append(len(figure.axes)), close(figure)))
    rows = [{"step": 0, "iou": 0.3, "mass": 0.7}]
    rows += [{"step": step, "loss": 1 / step, "wrong": 0.1 / step} for step in (1, 2, 3)]
    rows.append({"step": 3, "iou": 0.4, "mass": 0.8})
    plot_curves(tmp_path / "curves.png", rows, SUMMARY, loss)
    assert figures == [drawn]
    assert _is_picture(tmp_path / "curves.png")


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (80, 64)])
def test_layers_of_any_model_are_drawn(tmp_path, shape):
    values = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    plot_layers(tmp_path / "layers.png", values, values / 2, "KV head")
    assert _is_picture(tmp_path / "layers.png")
