"""What methods are called and how they look: the same in tables, in pictures and on the page of a report."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from eval.methods import base_name

Style = dict[str, Any]  # keyword arguments of matplotlib's `plot`; "color" alone for bars

_SHORT = 20  # characters of a folder's part in a name; a longer one loses its middle
# the families of spotlight and of unknown methods have no line here: see `style_methods`
STYLES: dict[str, Style] = {
    "dense": {"color": "#444444", "linestyle": "--"},
    "oracle-scores": {"color": "#5c5c5c", "linestyle": ":", "marker": "*"},
    "oracle-query": {"color": "#999999", "linestyle": ":", "marker": "P"},
    "oracle-mass": {"color": "#868c98", "linestyle": ":", "marker": "d"},
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
REMARKS = {
    "oracle-scores": "the tokens with the highest true dot products, summed over the query heads that read one set",
    "oracle-mass": "the tokens with the highest attention probabilities of the query heads that read one set together",
    "quest": "whole pages of 16 tokens, as many as fit into the budget",
    "magicpig": "what its hash tables draw, as published; no share is asked of it",
}
_BLUES = ("#1f6f8b", "#56a9d6", "#1c3f7c", "#8fb8de", "#3b6fd4")
_BLUE_MARKERS = ("o", "D", "s", "^", "p", "v")
_OTHERS = ("#c0504d", "#93801f", "#2f7d4f", "#c27ba0", "#7f5a3c", "#6b3fa0", "#d9902f")
_OTHER_MARKERS = ("<", ">", "8", "H")


def name_methods(methods: Iterable[str]) -> dict[str, str]:
    """Return each method's name for people, in the order given: the shortest that differs from the others.

    A selector's folder is left out where it is the only one, else as little of its path stands for it as no other has.
    Rows and files keep full names.
    """
    found = tuple(dict.fromkeys(methods))
    counts = Counter(base_name(name) for name in found)
    folders = [name.partition("@")[2] for name in found if "@" in name]

    def name_all(show: Callable[[str], str]) -> dict[str, str]:
        names = {}
        for name in found:
            base, at, folder = name.partition("@")
            is_alone = not at or counts[base] == 1
            names[name] = base if is_alone else f"{base} {show(_tell_apart(folder, folders))}"
        return names

    for show in (_shorten, str):
        names = name_all(show)
        if len(set(names.values())) == len(names):
            return names
    return {name: name for name in found}


def explain_names(methods: Iterable[str]) -> list[tuple[str, str]]:
    """List each name for people that stands for a selector's folder, with the folder."""
    return [(shown, name.partition("@")[2]) for name, shown in name_methods(methods).items() if shown != name]


def explain_methods(methods: Iterable[str]) -> list[tuple[str, str]]:
    """List what a reader must know of some methods, with their names."""
    return [(name, REMARKS[name]) for name in dict.fromkeys(map(base_name, methods)) if name in REMARKS]


def _tell_apart(folder: str, folders: Sequence[str]) -> str:
    """Return the fewest neighbouring parts of a path that no other path has, the last of these; else all of it."""
    parts = _parts(folder)
    others = {run for other in folders if other != folder for run in _runs(_parts(other))}
    runs = (run for run in _runs(parts) if run not in others)
    return "/".join(next(runs, ())) or folder


def _parts(folder: str) -> tuple[str, ...]:
    """Return a path's folders, without `selector`, which every run has."""
    path = PurePosixPath(folder)
    parts = path.parts[1:] if path.is_absolute() else path.parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "selector" else parts


def _runs(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return all neighbouring parts: the fewest first, and of these the last first."""
    sizes = range(1, len(parts) + 1)
    return [parts[start : start + size] for size in sizes for start in range(len(parts) - size, -1, -1)]


def _shorten(text: str) -> str:
    """Return a long text without its middle."""
    half = (_SHORT - 1) // 2
    return text if len(text) <= _SHORT else f"{text[:half]}…{text[half + 1 - _SHORT :]}"


def style_methods(methods: Iterable[str]) -> dict[str, Style]:
    """Return how methods are drawn: selectors in blues, known methods always alike, others by a fixed cycle.

    Takes full names and those of `name_methods`, which may carry a remark ("spotlight, 64 bits").
    """
    found = tuple(dict.fromkeys(methods))
    selectors = [name for name in found if _family(name) == "spotlight"]
    unknown = [name for name in found if _family(name) != "spotlight" and name not in STYLES]
    blues = zip(selectors, itertools.cycle(_BLUES), itertools.cycle(_BLUE_MARKERS), strict=False)
    others = zip(unknown, itertools.cycle(_OTHERS), itertools.cycle(_OTHER_MARKERS), strict=False)
    drawn = {name: {"color": color, "marker": marker, "linewidth": 2.2, "zorder": 3} for name, color, marker in blues}
    drawn |= {name: {"color": color, "marker": marker} for name, color, marker in others}
    return {name: drawn.get(name) or STYLES[name] for name in found}


def _family(name: str) -> str:
    """Return a method without its selector's folder and without a remark."""
    return re.split("[@ ,+]", name, maxsplit=1)[0]
