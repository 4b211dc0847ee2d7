"""Bar charts as SVG that follows the page's colours."""

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup

from eval.methods import base_name

_WIDTH, _ROW, _BAR = 460, 19, 12  # pixels
_LABEL, _VALUE = 140, 62  # room for names on the left, numbers on the right
_TOP = 40


_BAR_SVG = Markup(
    '<text class="label" x="{end_of_label}" y="{middle}">{bar.label}</text>'
    '<rect class="m-{kind}" x="{left}" y="{top}" width="{width:.1f}" height="{height}" rx="2">'
    "<title>{bar.label}: {bar.shown}</title></rect>"
    '<text class="value" x="{start_of_value:.1f}" y="{middle}">{bar.shown}</text>'
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar."""

    label: str
    method: str  # chooses the colour
    value: float
    shown: str


def nice_ceiling(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if value <= step * power * (1 + 1e-9))


def draw_bars(title: str, direction: str, bars: Sequence[Bar]) -> Markup:
    """Horizontal bars from 0; a dashed line stands at the dense model's value, where there is one.

    Where values differ by more than a factor of 20 the scale is logarithmic, from the least, and says so.
    """
    values = [bar.value for bar in bars if bar.value > 0 and math.isfinite(bar.value)]
    is_log = bool(values) and max(values) > 20 * min(values) and min(bar.value for bar in bars) > 0
    low, high = (min(values) / 2, max(values)) if is_log else (0.0, nice_ceiling(max(values, default=1.0)))
    room = _WIDTH - _LABEL - _VALUE

    def place(value: float) -> float:
        if not math.isfinite(value):
            return room
        if is_log:
            return room * math.log(max(value, low) / low) / math.log(high / low)
        return room * value / high

    height = _TOP + _ROW * len(bars) + 8
    note = f"{direction}{', logarithmic' if is_log else ''}"
    lines = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, height, title),
        Markup('<text class="title" x="0" y="14">{}</text>').format(title),
        Markup('<text class="note" x="0" y="30">{}</text>').format(note),
    ]
    for number, bar in enumerate(bars):
        top, width = _TOP + _ROW * number, max(place(bar.value), 1.0)
        kind = base_name(bar.method).split("-")[0]
        lines.append(_BAR_SVG.format(
            bar=bar, kind=kind, top=top, middle=top + _BAR / 2 + 4, left=_LABEL, width=width,
            height=_BAR, end_of_label=_LABEL - 8, start_of_value=_LABEL + width + 5,
        ))  # fmt: skip
    if dense := [bar for bar in bars if bar.method == "dense"]:
        x = _LABEL + place(dense[0].value)
        lines.append(
            Markup('<line class="dense" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, _TOP - 4, height - 6)
        )
    return Markup("\n").join([*lines, Markup("</svg>")])
