"""Bar charts as SVG; the page lifts their colours where it is dark."""

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup

_WIDTH, _ROW, _BAR = 258, 19, 12  # pixels
_LABEL, _LETTER = 140, 6.4  # space for names on the left: at least, and that of a letter
_VALUE = 62  # space for numbers on the right
_TOP = 40


_BAR_SVG = Markup(
    '<text class="label" x="{end_of_label}" y="{middle}">{bar.label}</text>'
    '<rect style="--bar: {bar.color}" x="{left}" y="{top}" width="{width:.1f}" height="{height}" rx="2">'
    "<title>{bar.label}: {bar.shown}</title></rect>"
    '<text class="value" x="{start_of_value:.1f}" y="{middle}">{bar.shown}</text>'
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar."""

    label: str
    value: float
    shown: str
    color: str
    is_dense: bool = False


def nice_ceiling(value: float) -> float:
    """Return the next 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if value <= step * power * (1 + 1e-9))


def draw_bars(title: str, direction: str, bars: Sequence[Bar]) -> Markup:
    """Draw horizontal bars from 0; a dashed line stands at the dense model's value, where there is one.

    Where values differ by more than a factor of 20 the scale is logarithmic, from the least, and a note says so.
    """
    values = [bar.value for bar in bars if bar.value > 0 and math.isfinite(bar.value)]
    is_log = bool(values) and max(values) > 20 * min(values) and min(bar.value for bar in bars) > 0
    low, high = (min(values) / 2, max(values)) if is_log else (0.0, nice_ceiling(max(values, default=1.0)))
    left = max([_LABEL, *(math.ceil(_LETTER * len(bar.label)) + 12 for bar in bars)])

    def place(value: float) -> float:
        if not math.isfinite(value):
            return _WIDTH
        if is_log:
            return _WIDTH * math.log(max(value, low) / low) / math.log(high / low)
        return _WIDTH * value / high

    height = _TOP + _ROW * len(bars) + 8
    note = f"{direction}{', logarithmic' if is_log else ''}"
    frame = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    lines = [
        frame.format(left + _WIDTH + _VALUE, height, title),
        Markup('<text class="title" x="0" y="14">{}</text>').format(title),
        Markup('<text class="note" x="0" y="30">{}</text>').format(note),
    ]
    for number, bar in enumerate(bars):
        top, width = _TOP + _ROW * number, max(place(bar.value), 1.0)
        lines.append(_BAR_SVG.format(
            bar=bar, top=top, middle=top + _BAR / 2 + 4, left=left, width=width,
            height=_BAR, end_of_label=left - 8, start_of_value=left + width + 5,
        ))  # fmt: skip
    if dense := [bar for bar in bars if bar.is_dense]:
        x = left + place(dense[0].value)
        lines.append(
            Markup('<line class="dense" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, _TOP - 4, height - 6)
        )
    return Markup("\n").join([*lines, Markup("</svg>")])
