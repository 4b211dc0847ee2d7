"""Tasks of lm-evaluation-harness (MMLU, GSM8K, RULER, ...) with any method; needs the extra `eval`, never torch.

    pip install -e '.[eval]'
    spotlight eval harness --selector runs/smollm2 --tasks arc_easy lambada_openai --limit 100
    spotlight eval harness --selector runs/smollm2 --tasks gsm8k --fewshot 5 --chat --batch 8
    spotlight eval harness --task-folder my_tasks --tasks my_task --question-sparse
    pip install wonderwords nltk    # what RULER's tasks are made with
    spotlight eval harness --model smollm2-135m-32k --selector runs/32k --lengths 4096 32768 --limit 50 \\
        --tasks niah_single_1 niah_multikey_2 niah_multikey_3 ruler_vt ruler_cwe ruler_fwe

Contexts are passed densely, as a prefill, and continuations scored or written as decoding does. A task whose answers
are one token long then says nothing about a method: its only query belongs to the context. Each row counts the tokens
that were scored or chosen by a query which left tokens out (`tokens_by_selection`), and a line names the tasks without
any. --question-sparse passes the question (what follows the context's last blank line) sparsely too.

RULER's tasks make their texts for this model's tokenizer, as long as --lengths says. Those above need no download; the
other needles take essays from the hub, ruler_qa_squad and ruler_qa_hotpot fetch questions.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from eval.common.flags import EvalConfig
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by


@dataclasses.dataclass(frozen=True)
class HarnessConfig(EvalConfig):
    """Which tasks, and how they are asked."""

    tasks: tuple[str, ...] = ()
    """Tasks or groups by the harness's names."""
    task_folder: str | None = None
    """Folder with task definitions (YAML) in addition to the harness's."""
    fewshot: int | None = None
    """Examples before each question; without it, as each task defines."""
    limit: int | None = None
    """Documents of each task; without it, all."""
    batch: int = 1
    """Sequences passed (dense) or continued (dense, spotlight) together."""
    chat: bool = False
    """Ask through the model's chat template."""
    question_sparse: bool = False
    """Pass the question after the context sparsely too, not only what follows it."""
    max_length: int | None = None
    """Tokens of a sequence; longer ones lose their beginning. Without it, the model's context."""
    lengths: tuple[int, ...] = ()
    """Tokens of a text and its answer, in tasks that make texts of a length (ruler); each length is asked apart.
    Without it, as the task defines (ruler: 4096)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        super().__post_init__()
        if not self.tasks:
            raise InputError("give --tasks, by lm-evaluation-harness's names")
        for name in ("limit", "batch", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if len(set(self.lengths)) < len(self.lengths) or min(self.lengths, default=1) < 1:
            raise InputError(f"lengths are {self.lengths}; give numbers of tokens of at least 1, each once")
        if self.fewshot is not None and self.fewshot < 0:
            raise InputError(f"fewshot is {self.fewshot}; give 0 examples or more")
        if self.task_folder is not None and not Path(self.task_folder).is_dir():
            raise InputError(f"there is no folder '{self.task_folder}' of tasks")

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `EvalConfig`."""
        return (*super().free_fields, "tasks", "batch")


main = cli.main_of("eval.harness.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval harness`."""
    return cli.run(main, HarnessConfig, "spotlight eval harness", __doc__, args, stored_by(HarnessConfig))
