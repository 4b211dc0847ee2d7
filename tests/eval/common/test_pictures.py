"""eval.common.pictures: where axes end, and that a picture's title, names and legend keep out of each other's way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.common import pictures


def row(method, keep, ppl, size, setting="bare"):
    return {"method": method, "keep": keep, "setting": setting, "ppl": ppl, "bytes_read": size * 2**20}


ROWS = [
    row("dense", 1.0, 10.0, 90, "everything"),
    *(row("spotlight@/tmp/ab/wide/selector", keep, 11 + 0.1 / keep, 100 * keep) for keep in (0.02, 0.1)),
    *(row("spotlight@/tmp/ab/paper/selector", keep, 12 + 0.1 / keep, 120 * keep) for keep in (0.02, 0.1)),
    *(row("quest", keep, 2 / keep, 90 * keep) for keep in (0.02, 0.1)),
    *(row("random", keep, 100 / keep, 70 * keep) for keep in (0.02, 0.1)),
    row("magicpig", None, 14.0, 15, "as published"),
]
TITLE = "a model, 8,192 tokens, " + ", ".join(f"text:number {n}" for n in range(12))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of `ROWS` as it was written, by a renderer that measures it."""
    found, save = [], Figure.savefig

    def keep(figure, *args, **how):
        found.append(figure)
        save(figure, *args, **how)
        FigureCanvasAgg(figure)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(rows):
        pictures.plot_tradeoff(tmp_path / "x.png", rows, "ppl", "perplexity", TITLE)
        assert (tmp_path / "x.png").stat().st_size > 10_000
        return found[-1]

    return draw


@pytest.mark.parametrize("settings", [["bare"], ["bare", "sinks 4 + recent 64"]])
def test_title_legend_and_panels_do_not_overlap(drawn, settings):
    rows = [entry | {"setting": setting} for setting in settings for entry in ROWS]
    figure = drawn(rows)
    renderer = figure.canvas.get_renderer()
    legend = figure.axes[-1].get_legend().get_window_extent(renderer)
    title = figure._suptitle.get_window_extent(renderer)
    panels = [axis.get_window_extent(renderer) for axis in figure.axes]
    assert len(panels) == len(settings)
    assert not any(legend.overlaps(panel) for panel in panels) and not title.overlaps(legend)
    headings = [axis.title.get_window_extent(renderer) for axis in figure.axes]
    assert not any(title.overlaps(box) for box in [*panels, *headings])
    for box in (legend, title, *panels):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1


def test_the_legend_names_methods_in_short_and_says_who_is_off_the_axis(drawn):
    axis = drawn(ROWS).axes[0]
    told = [text.get_text() for text in axis.get_legend().get_texts()]
    assert told == [
        "dense (90 MiB)", "spotlight wide", "spotlight paper", "quest (up to 100)", "random (off: 1,000 to 5,000)",
        "magicpig",
    ]  # fmt: skip
    low, high = axis.get_ylim()
    assert low < 10.0 and 20.0 < high < 40  # quest's better point is the highest that shows


def test_rows_stay_as_they_are(drawn):
    rows = [dict(entry) for entry in ROWS]
    drawn(rows)
    assert rows == ROWS


@given(st.lists(st.floats(1, 1e4), min_size=1))
def test_at_least_half_of_the_values_lie_on_the_axis(values):
    end = pictures.find_end(values)
    assert 2 * sum(value <= end for value in values) >= len(values)
    assert (pictures.describe_outside(values, end) == "") == all(value <= end for value in values)


@pytest.mark.parametrize(
    ("values", "told"),
    [([3.0, 40.0], ""), ([3.0, 57.36], " (up to 57.4)"), ([873.0, 4672.5], " (off: 873 to 4,672)"),
     ([873.0], " (off: 873)")],
)  # fmt: skip
def test_what_lies_outside_is_told(values, told):
    assert pictures.describe_outside(values, 48.0) == told


@given(st.text("abc ,", min_size=1, max_size=200), st.floats(1, 20), st.sampled_from([9.0, 12.0]))
def test_lines_fit_their_width(text, width, size):
    lines = pictures.wrap(text, width, size).split("\n")
    assert all(len(line) * 0.6 * size <= max(72 * width, 8 * 0.6 * size) for line in lines)
