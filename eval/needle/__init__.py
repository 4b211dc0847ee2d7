"""Needle in a haystack: does a method still find what lies far back, and does the dense model, by length and depth?

    spotlight eval needle --selector runs/demo --variant passkey --lengths 512 1024        # two CPU cores
    spotlight eval needle --selector runs/smollm2 --samples 5 --keep 0.02 0.05 \\
        --methods dense oracle-scores spotlight lsh quest magicpig window random                  # for a GPU

Variants: `needle` hides a sentence in a text and asks for it, `passkey` five digits; `copy` hides nothing but comes
back to a passage of the text and scores how well the model goes on with it. The haystack is read densely (prefill);
what comes after it reads as each method does, the question too (--sparse-from answer: only the answer).

Every answer token is scored given the ones before it. A greedy decoder would write the answer exactly when each of its
tokens is then the most probable one, so that `exact` needs one pass and no decoding; `ROUGE-L` is that of the most
probable tokens. `--generate` writes answers token by token instead, and scores those.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from eval.common.flags import EvalConfig
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by

Variant = Literal["needle", "passkey", "copy"]


@dataclasses.dataclass(frozen=True)
class NeedleConfig(EvalConfig):
    """What is hidden where, and who looks for it."""

    variant: Variant = "needle"
    """needle: a sentence; passkey: five digits; copy: the rest of a passage that begins again."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of the whole, question and answer included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places where it is hidden: 0 is the start of the haystack, 1 its end."""
    samples: int = 1
    """Texts of each length and depth, each with another haystack and something else hidden."""
    passage: int = 128
    """Tokens of the passage that `copy` repeats."""
    haystack: str = "text:sherlock"
    """A text file, a folder or glob of them, or an embedded text (text:NAME)."""
    text_column: str = "text"
    """Key or column that holds the text in a haystack of JSON, CSV or parquet; rows where it is null are left out."""
    sparse_from: Literal["question", "answer"] = "question"
    """Read sparsely from the question on, or from the answer on as generation does (its first token is then dense)."""
    generate: bool = False
    """Write each answer token by token for its ROUGE-L, instead of the most probable tokens after the right ones."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        super().__post_init__()
        for name in ("lengths", "depths"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"give --{name} at least one, each once")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths are {self.depths}; give numbers from 0 (the start) to 1 (the end)")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; give at least 1")
        if self.variant != "copy" and self.passage != NeedleConfig.passage:
            raise InputError(f"--passage is of --variant copy; a {self.variant} has none")
        if self.passage < 32:
            raise InputError(f"passage is {self.passage}; give at least 32 tokens, 16 of which ask for the rest")
        if min(self.lengths) < 1:
            raise InputError(f"lengths are {self.lengths}; give at least 1 token")

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `EvalConfig`."""
        return (*super().free_fields, "lengths", "depths")


main = cli.main_of("eval.needle.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval needle`."""
    return cli.run(main, NeedleConfig, "spotlight eval needle", __doc__, args, stored_by(NeedleConfig))
