"""LongBench v1: answer its 21 tasks with each method, or score predictions that are there already.

    spotlight eval longbench score predictions/                                   # no model, no JAX: seconds
    spotlight eval longbench --data LongBench/data --model meta-llama/Llama-3.1-8B-Instruct --selector runs/llama
    spotlight eval longbench --tasks hotpotqa trec --limit 20 --methods dense oracle-scores quest

Prompts, lengths and metrics are LongBench's. A run folder holds predictions/<method>/<task>.jsonl in its layout; each
task's agreement with the dense model's own answers (`fidelity`) stands beside its score. Answers are greedy. A run
that was interrupted goes on with --resume where it stopped, in the middle of a task too.
"""

import sys
from collections.abc import Sequence

from spotlight_jax import cli

PROG = "spotlight eval longbench"


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight eval longbench`, and `spotlight eval longbench score`, which starts without JAX."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["score"]:
        import eval.longbench_score as score

        return cli.run(score.main, score.ScoreConfig, f"{PROG} score", score.__doc__ or "", given[1:])
    import eval.longbench_generate as generate
    from eval.record import stored_by

    config_class = generate.LongBenchConfig
    return cli.run(generate.main, config_class, PROG, __doc__, given, stored_by(config_class))


if __name__ == "__main__":
    sys.exit(command())
