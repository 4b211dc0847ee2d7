"""Tables of figures in the documentation, rendered from docs/data/*.json.

    python -m docs.tables            # write every marked table
    python -m docs.tables --check    # exit code 1 where a page holds something else

A page marks a table with `<!-- table: NAME -->` and `<!-- /table -->`. A file in docs/data holds tables by name: the
command that measured the figures, the machine, the date and the commit, columns, and rows. Numbers are shown as they
are written in the file, so that a figure keeps its digits.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")))
FIELDS = ("command", "machine", "date", "commit", "columns", "rows")
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


class Number(str):
    """A number as it is written in the file."""


def load_tables() -> dict[str, dict[str, Any]]:
    """Return all tables by name; numbers are `Number`, to keep their digits."""
    tables: dict[str, dict[str, Any]] = {}
    for file in sorted((DOCS / "data").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"), parse_float=Number, parse_int=Number)
        assert not set(found) & set(tables), f"{file} holds a table that another file holds"
        tables |= found
    return tables


def show_cell(value: Any) -> str:
    """Return a cell's text: a number with commas and without a leading zero, several of them with semicolons."""
    if isinstance(value, list):
        return "; ".join(map(show_cell, value))
    if not isinstance(value, Number):
        return str(value)
    whole, point, fraction = value.partition(".")
    return f"{int(whole):,}{point}{fraction}" if whole != "0" or not point else f".{fraction}"


def render(table: dict[str, Any]) -> str:
    """Return a table as Markdown; cells named in `strong` (row, column) are bold."""
    strong = {(int(row), int(column)) for row, column in table.get("strong", ())}
    lines = [table["columns"], ["---"] * len(table["columns"])]
    for number, row in enumerate(table["rows"]):
        cells = [show_cell(cell) for cell in row]
        lines.append([f"**{cell}**" if (number, place) in strong else cell for place, cell in enumerate(cells)])
    spaced = [[cell if cell == "---" else f" {cell} " if cell else " " for cell in line] for line in lines]
    return "".join(f"|{'|'.join(line)}|\n" for line in spaced)


def fill(text: str, tables: dict[str, dict[str, Any]]) -> str:
    """Return a page with all of its marked tables rendered; raises KeyError for one that no file holds."""
    return _BLOCK.sub(lambda found: found[1] + "\n" + render(tables[found[2]]) + "\n" + found[4], text)


def main(args: list[str]) -> int:
    """Write or check every page; returns the exit code."""
    tables, stale = load_tables(), []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, tables)) != text:
            stale.append(str(page.relative_to(DOCS.parent)))
            if "--check" not in args:
                page.write_text(filled, encoding="utf-8")
    if stale and "--check" in args:
        print(f"{', '.join(stale)}: a table is not what docs/data holds; run python -m docs.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
