"""Pictures of perplexity against bytes read, drawn from the figures in docs/data.

    python -m docs.pictures      # writes docs/images/perplexity.png and comparison.png

The other pictures were drawn by the commands that measured them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.tables import DOCS, load_tables
from eval.common.pictures import plot_tradeoff

Row = dict[str, Any]


def rows_of(table: dict[str, Any]) -> list[Row]:
    """Return a table's mean perplexities with the bytes that a token reads, as evaluations hand them to pictures."""
    columns = table["columns"]
    return [
        {
            "method": row[0],
            "setting": "bare",
            "keep": row[columns.index("kept")] or None,
            "perplexity": float(row[columns.index("mean")]),
            "bytes_read": float(row[columns.index("MiB")]) * 2**20,
        }
        for row in table["rows"]
    ]


def with_default(rivals: Sequence[Row], default: Sequence[Row]) -> list[Row]:
    """Return the rivals' rows and, of the default's, those of spotlight and of the oracle that the rivals lack."""
    return [*rivals, *(row for row in default if row["method"] in ("spotlight", "spotlight, 64 bits", "oracle-scores"))]


def main(folder: Path = DOCS / "images") -> int:
    """Draw both pictures into a folder; returns the exit code."""
    tables = load_tables()
    default, rivals = rows_of(tables["perplexity"]), rows_of(tables["rivals"])
    label, title = "perplexity, mean of six texts", "SmolLM2-135M, 8,192 tokens"
    plot_tradeoff(folder / "perplexity.png", default, "perplexity", label, f"{title}, 2 and 10 % read")
    rows = with_default(rivals, default)
    plot_tradeoff(folder / "comparison.png", rows, "perplexity", label, f"{title}, 2, 5 and 10 % read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
