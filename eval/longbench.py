"""LongBench v1: answer its 21 tasks with each method, or score predictions that are there already.

python -m eval.longbench score predictions/                                  # no model, no JAX
python -m eval.longbench --data LongBench/data --selector runs/llama --model meta-llama/Llama-3.1-8B
python -m eval.longbench --tasks hotpotqa trec --limit 20 --methods dense spotlight quest
"""

import sys
from collections.abc import Sequence

from spotlight_jax import cli

PROG = "spotlight eval longbench"


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight eval longbench`, and `spotlight eval longbench score`, which starts without JAX."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["score"]:
        from eval import longbench_score

        return cli.run(
            longbench_score.main, longbench_score.ScoreConfig, f"{PROG} score", longbench_score.__doc__ or "", given[1:]
        )
    from eval import longbench_generate

    return cli.run(longbench_generate.main, longbench_generate.LongBenchConfig, PROG, __doc__, given)


if __name__ == "__main__":
    sys.exit(command())
