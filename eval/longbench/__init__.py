"""LongBench v1: answer its 21 tasks with each method, or score predictions that are there already.

    spotlight eval longbench score predictions/                                   # no model, no JAX: seconds
    spotlight eval longbench --data LongBench/data --model meta-llama/Llama-3.1-8B-Instruct --selector runs/llama
    spotlight eval longbench --tasks hotpotqa trec --limit 20 --methods dense oracle-scores quest

Prompts, lengths and metrics are LongBench's. A run folder holds predictions/<method>/<task>.jsonl in its layout; each
task's agreement with the dense model's answers (`fidelity`) comes with its score. Answers are greedy. A run
that was interrupted goes on with --resume where it stopped, in the middle of a task too.
"""

import dataclasses
import sys
from collections.abc import Sequence

from eval.common.flags import EvalConfig
from eval.longbench import score
from eval.longbench.tasks import TASKS, TASKS_E, find_task
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by

PROG = "spotlight eval longbench"


@dataclasses.dataclass(frozen=True)
class LongBenchConfig(EvalConfig):
    """Which questions are answered, and how they are asked. To score predictions: `score FOLDER`."""

    data: str = "hf:Xnhyacinth/LongBench"
    """A folder of LongBench's files (<task>.jsonl, or parquet), or hf:OWNER/NAME, a data set of the hub in parquet."""
    tasks: tuple[str, ...] = ()
    """Tasks to ask; without it, all 21 (13 of LongBench-E), or those that a folder holds."""
    e: bool = False
    """Ask LongBench-E: files <task>_e, with contexts spread evenly over lengths; scores by length too."""
    limit: int | None = None
    """Number of first questions of each task; without it, all."""
    max_length: int | None = None
    """Tokens of a prompt before the chat template; longer ones lose their middle. Without it, what the context
    holds."""
    chat: bool = True
    """Ask through the model's chat template, if it has one, all but few-shot and code tasks, as published."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        super().__post_init__()
        for name in self.tasks:
            if find_task(name).name not in TASKS_E and self.e:
                raise InputError(f"LongBench-E has no task '{name}'; it has {', '.join(TASKS_E)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}; give at least 1 question")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; give at least 2 tokens")

    @property
    def asked_tasks(self) -> list[str]:
        """List the tasks in LongBench's order, before it is known which ones are there."""
        return [name for name in TASKS if name in (self.tasks or (TASKS_E if self.e else TASKS))]

    def file_name(self, task: str) -> str:
        """Return the name of a task's file."""
        return f"{task}_e" if self.e else task

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `EvalConfig`."""
        return (*super().free_fields, "tasks")


main = cli.main_of("eval.longbench.answer")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval longbench`, and `spotlight eval longbench score`, which needs no JAX."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["score"]:
        return cli.run(score.main, score.ScoreConfig, f"{PROG} score", score.__doc__ or "", given[1:])
    return cli.run(main, LongBenchConfig, PROG, __doc__, given, stored_by(LongBenchConfig))
