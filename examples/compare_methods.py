"""Perplexity when each query reads what a method selects: several methods on one text, as rows for your own analysis.

    python examples/compare_methods.py [runs/demo]       two CPU cores: one to three minutes

The same from a shell, with tables, pictures and a run that can be resumed: spotlight eval perplexity --help
"""

import sys

from eval.perplexity import PerplexityConfig
from eval.perplexity.run import main as measure

METHODS = ("dense", "oracle-mass", "quest", "window", "random")


def main(cfg):
    """Print each method's perplexity with the tokens and bytes that a query reads."""
    rows = measure(cfg)["results"]
    dense = next(row["ppl_pooled"] for row in rows if row["method"] == "dense")
    for row in sorted(rows, key=lambda row: row["ppl_pooled"]):
        read = f"{row['tokens_read']:6.1f} tokens, {row['bytes_read'] / 2**20:6.2f} MiB"
        ratio = f"{row['ppl_pooled'] / dense:.3f} of dense"
        print(f"{row['method']:14} perplexity {row['ppl_pooled']:8.3f} ({ratio}), reads {read}")
    return rows


if __name__ == "__main__":
    selector = sys.argv[1] if len(sys.argv) > 1 else None
    methods = (*METHODS, "spotlight", "spotlight+tail") if selector else METHODS
    main(
        PerplexityConfig(
            selector=selector, methods=methods, keep=(0.05,), texts=("text:alice",), window=1024, windows_per_text=1
        )
    )
