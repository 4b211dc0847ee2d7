"""A report as one HTML page: no network, no other file."""

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eval.common.cases import describe_keep
from eval.common.labels import explain_methods, explain_names, name_methods, style_methods
from eval.common.record import ALL_TEXTS
from eval.report.charts import Bar, draw_bars
from spotlight_jax import files

_MIB = 2**20
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """A field of result rows, as a table shows it."""

    field: str
    title: str
    show: Callable[[Any], str] = str


@dataclasses.dataclass(frozen=True)
class Score:
    """The figure that stands for an evaluation when methods are compared."""

    field: str
    title: str
    is_better_high: bool
    show: Callable[[Any], str]


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:,.{digits}f}"


def _significant(value: Any) -> str:
    return f"{value:#.4g}".rstrip(".")


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %"


def _mib(value: Any) -> str:
    return f"{value / _MIB:,.2f}"


def _micro(value: Any) -> str:
    return f"{value * 1e6:,.1f}"


_WHO = (Column("method", "method"), Column("keep", "keep", describe_keep))
_ALWAYS = (Column("setting", "always read"),)
_READS = (Column("tokens_read", "tokens read", _number(0)), Column("bytes_read", "MiB read", _mib))
COLUMNS: dict[str, tuple[Column, ...]] = {
    "perplexity": (
        *_WHO, *_ALWAYS, Column("text", "text"), Column("ppl", "perplexity, mean of documents", _significant),
        Column("ppl_pooled", "perplexity of all tokens", _significant), *_READS,
        Column("index_bytes", "of it index, MiB", _mib), Column("estimated", "share estimated", _number(3)),
    ),
    "inspect": (
        *_WHO, *_ALWAYS, Column("text", "text"), Column("iou", "IoU with oracle-scores", _number(3)),
        Column("recall", "recall", _number(3)), Column("mass", "mass read", _number(3)),
        Column("oracle_mass", "mass of oracle-scores", _number(3)), Column("error", "output error", _number(3)),
        Column("estimated", "share estimated", _number(3)), *_READS,
    ),
    "needle": (
        *_WHO, *_ALWAYS, Column("questions", "questions", _number(0)), Column("exact", "exact answers", _percent),
        Column("accuracy", "right tokens", _percent),
        Column("rouge", "ROUGE-L", _number(3)), Column("ppl", "perplexity of the answer", _significant), *_READS,
    ),
    "longbench": (
        *_WHO, *_ALWAYS, Column("task", "task"), Column("count", "questions", _number(0)),
        Column("score", "score of 100", _number(2)),
        Column("fidelity", "agreement with dense", _number(3)), *_READS,
    ),
    "harness": (
        *_WHO, *_ALWAYS, Column("task", "task"), Column("metric", "metric"),
        Column("questions", "questions", _number(0)), Column("score", "score", _significant),
        Column("tokens_scored", "tokens scored", _number(0)), Column("tokens_by_selection", "by selection", _number(0)),
        Column("truncated", "cut", _number(0)), *_READS,
    ),
    "speed": (
        Column("task", "what"), Column("op", "operation"), Column("method", "method"), Column("batch", "batch"),
        Column("length", "tokens", _number(0)), Column("seconds", "µs", _micro), Column("least", "least", _micro),
        Column("greatest", "greatest", _micro), Column("floor_seconds", "floor, µs", _micro),
        Column("tokens_per_second", "tokens/s", _number(1)), Column("bytes_read", "MiB moved", _mib),
    ),
}  # fmt: skip
SCORES: dict[str, tuple[Score, ...]] = {
    "perplexity": (Score("ppl_pooled", "perplexity of all tokens", False, _significant),),
    "inspect": (
        Score("iou", "IoU with oracle-scores", True, _number(3)),
        Score("mass", "attention mass read", True, _number(3)),
    ),
    "needle": (Score("score", "answers found", True, _percent),),
    "longbench": (Score("score", "score of 100", True, _number(2)),),
    "harness": (Score("score", "score", True, _significant),),
    "speed": (),
}
# fields of configs that a reader must know
_FACTS = (
    "texts", "window", "windows_per_text", "queries", "variant", "lengths", "depths", "samples", "haystack", "tasks",
    "limit", "fewshot", "chat", "question_sparse", "preset", "batches", "rounds", "dtype",
)  # fmt: skip
# rows that are means over others, where there are several
_WHOLE = {"perplexity": ("text", ALL_TEXTS), "inspect": ("text", ALL_TEXTS), "longbench": ("task", "mean")}
_ABOUT = {
    "inspect": "How far each method's choice agrees with the tokens that attention really reads: overlap with "
    "`oracle-scores` (IoU), and the share of attention probability on what is read (mass). Means over sparse layers "
    "and heads.",
    "perplexity": "Teacher-forced: the query at each position reads what a decoding step there would. Lower is better.",
    "needle": "Something is hidden far back in a text, which is read densely; the question after it reads as the "
    "method does.",
    "longbench": "LongBench's questions, answered greedily, scored as published.",
    "harness": "Tasks of lm-evaluation-harness. `by selection` counts tokens that were scored or chosen by a query "
    "which left tokens out: where it is 0, the task says nothing about the methods.",
    "speed": "Medians over rounds, checked outputs, random data; the floor is bytes moved over measured bandwidth.",
}


def list_methods(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the full names of all methods, each once."""
    return list(dict.fromkeys(row["method"] for part in parts for row in part["results"]))


def name_row(row: Row, names: Mapping[str, str]) -> str:
    """Return a short name for a method with its share and the tokens that it always reads.

    Args:
        names: of `eval.common.labels.name_methods`.
    """
    parts = [names[row["method"]]]
    if row.get("keep") is not None and row["method"] != "dense":
        parts.append(f"keep {row['keep']:g}" if row["keep"] <= 1 else f"{row['keep']:g} tokens")
    if str(row.get("setting", "")).startswith("sinks"):
        parts.append("+ sinks")
    return " ".join(parts)


def overall_rows(part: dict[str, Any]) -> list[Row]:
    """Return the rows that stand for a part: those over all its texts or tasks, where there are several."""
    field, value = _WHOLE.get(part["eval"], ("", None))
    found = [row for row in part["results"] if row.get(field) == value]
    return found or part["results"]


def list_scores(part: dict[str, Any]) -> list[tuple[str, Score, list[Row]]]:
    """Return each score of a part with its heading and rows; an apart one for each task of the harness."""
    rows, found = overall_rows(part), []
    for score in SCORES[part["eval"]]:
        if part["eval"] == "harness":
            for task in dict.fromkeys(row["task"] for row in rows):
                asked = [row for row in rows if row["task"] == task]
                is_high = "perplexity" not in asked[0]["metric"]
                named = dataclasses.replace(score, title=asked[0]["metric"], is_better_high=is_high)
                found.append((task, named, asked))
        elif part["eval"] == "needle" and part["config"]["variant"] == "copy":
            found.append((part["name"], Score("ppl", "perplexity of the copy", False, _significant), rows))
        elif part["eval"] == "needle":
            named = dataclasses.replace(score, title=f"{score.title}, of {rows[0]['questions']}")
            found.append((part["name"], named, rows))
        else:
            found.append((part["name"], score, rows))
    return found


def make_table(columns: Sequence[Column], rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, Any]:
    """Return what the template draws: titles, whether a column holds numbers, and cells as (shown, sorted by)."""
    rows = [row | {"method": names[row["method"]]} for row in rows]
    used = [column for column in columns if any(row.get(column.field) is not None for row in rows)]
    cells = []
    for row in rows:
        values = [row.get(column.field) for column in used]
        cells.append(
            [
                ("-" if value is None else column.show(value), "" if value is None else value)
                for column, value in zip(used, values, strict=True)
            ]
        )
    kinds = [all(isinstance(row.get(column.field), int | float | None) for row in rows) for column in used]
    return {"titles": [column.title for column in used], "is_number": kinds, "rows": cells}


def make_overview(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Make one line a method and share, one column a score; the best of each share that is no oracle is marked."""
    scores = [entry for part in parts for entry in list_scores(part)]
    names = name_methods(list_methods(parts))
    found = dict.fromkeys(name_row(row, names) for _, _, rows in scores for row in rows)
    if not found:
        return None
    heading, _, rows = max(scores, key=lambda entry: len(entry[2]))  # what is read depends on the lengths: of one part
    titles = ["method", f"{heading}: MiB read"]
    columns = [{name_row(row, names): (_mib(row["bytes_read"]), row["bytes_read"], False) for row in rows}]
    for heading, score, rows in scores:
        best = _find_best(score, rows)
        titles.append(f"{_head(heading, score)} {'↑' if score.is_better_high else '↓'}")
        cells = [(score.show(row[score.field]), row[score.field], row in best) for row in rows]
        columns.append(dict(zip((name_row(row, names) for row in rows), cells, strict=True)))
    ordered = sorted(found, key=lambda name: name != "dense")  # dense first, the others as they came
    lines = [[(name, name, False), *(column.get(name, ("-", "", False)) for column in columns)] for name in ordered]
    return {"titles": titles, "rows": lines}


def _head(heading: str, score: Score) -> str:
    """Return a score's name, with its part's where that says more."""
    return score.title if heading == score.title else f"{heading}: {score.title}"


def _find_best(score: Score, rows: Sequence[Row]) -> list[Row]:
    """Return the best row of each share and setting, oracles aside."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"] != "dense" and row["keep"] is not None and not row["method"].startswith("oracle-"):
            groups.setdefault((row["keep"], row.get("setting")), []).append(row)
    found = []
    for group in groups.values():
        values = [row[score.field] for row in group]
        best = max(values) if score.is_better_high else min(values)
        if min(values) < max(values):
            found += [row for row in group if row[score.field] == best]
    return found


def draw_charts(parts: Sequence[dict[str, Any]]) -> list[Markup]:
    """Draw a bar chart (SVG) of each score."""
    charts, methods = [], list_methods(parts)
    names, styles = name_methods(methods), style_methods(methods)
    for part in parts:
        for heading, score, rows in list_scores(part):
            bars = []
            for row in rows:
                value, color = row[score.field], styles[row["method"]]["color"]
                name = name_row(row, names)
                bars.append(Bar(name, float(value), score.show(value), color, row["method"] == "dense"))
            direction = "higher is better" if score.is_better_high else "lower is better"
            charts.append(draw_bars(_head(heading, score), direction, bars))
    return charts


def write_page(folder: Path, whole: dict[str, Any], missing: Sequence[str], plan: str) -> None:
    """Write `report.html`.

    Args:
        folder: the report's; pictures are read from the folders of its parts.
        whole: what `results.json` holds.
        missing: names of parts that have not run yet.
        plan: the YAML text.
    """
    sections, methods = [], list_methods(whole["parts"])
    names = name_methods(methods)
    for part in whole["parts"]:
        pictures = [
            (file.stem, base64.b64encode(file.read_bytes()).decode("ascii"))
            for file in sorted((folder / part["name"]).glob("*.png"), key=lambda file: file.stem)
        ]
        table = make_table(COLUMNS[part["eval"]], part["results"], names)
        about = _ABOUT[part["eval"]]
        sections.append({**part, "about": about, "pictures": pictures, "table": table, "facts": _facts(part)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        **whole,
        sections=sections,
        missing=missing,
        plan=plan,
        overview=make_overview(whole["parts"]),
        charts=draw_charts(whole["parts"]),
        folders=[*explain_names(methods), *explain_methods(methods)],
        model=next((part["config"]["model"] for part in whole["parts"] if "model" in part["config"]), None),
        selector=next((found for part in whole["parts"] if (found := part["config"].get("selector"))), None),
    )
    files.write_text(folder / "report.html", page)


def _facts(part: dict[str, Any]) -> list[tuple[str, str]]:
    """List what a reader must know of how a part was run, from its config."""
    config, facts = part["config"], []
    if config.get("copy_test"):
        copy = config["copy"]
        facts.append(("copy test", f"{copy['passage']} tokens, {copy['filler']} of another text, the first again"))
    for name in _FACTS:
        value = config.get(name)
        if value not in (None, [], False) and not (name == "window" and config.get("copy_test")):
            text = ", ".join(str(item).removeprefix("text:") for item in value) if isinstance(value, list) else value
            facts.append((name.replace("_", " "), str(text)))
    facts.append(("time", f"{part['seconds']:,.0f} s"))
    return facts
