"""Perplexity of texts when every query reads what a method selects, compared with other methods and the dense model.

    spotlight eval perplexity --selector runs/demo --texts text:alice --keep 0.02 0.05     # two CPU cores: minutes
    spotlight eval perplexity --selector runs/smollm2 --window 8192 --settings bare sinks \\
        --methods dense oracle-scores spotlight lsh quest magicpig window --keep 0.02 0.05 0.1    # for a GPU
    spotlight eval perplexity --selector runs/demo --copy-test                             # far tokens alone

Teacher-forced: the query at each position reads what a decoding step there would, from the tokens before it
(--whole-length gives the paper's budgets instead). Each window counts as a document; a text's perplexity is the mean of
its documents' exp(mean negative log-likelihood), and `pooled` is that of all its tokens together; `by_position` (and
by_position.png) that of the tokens which the queries in each part of the sequence predict.
"""

import dataclasses
from collections.abc import Sequence

from eval.common.flags import EvalConfig, ForwardConfig
from eval.perplexity.copy_text import CopyConfig
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by


@dataclasses.dataclass(frozen=True)
class PerplexityConfig(ForwardConfig, EvalConfig):
    """Which texts, how long, and how they are read."""

    texts: tuple[str, ...] = ("embedded-test",)
    """Text files, folders, globs, .npy files of token ids, hub data sets (hf:NAME[:CONFIG][:SPLIT]), embedded texts
    (text:alice, ...; embedded-test: all six that no training sees)."""
    window: int = 2048
    """Tokens in one window."""
    windows_per_text: int = 2
    """Windows of each text, spread over it."""
    text_column: str = "text"
    """Key or column that holds the text in JSON, CSV, parquet and hub data sets; rows where it is null are left out."""
    copy_test: bool = False
    """Instead of windows, texts in which a passage comes twice; the second copy alone is scored."""
    copy: CopyConfig = CopyConfig()

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        EvalConfig.__post_init__(self)
        ForwardConfig.__post_init__(self)
        if self.windows_per_text < 1:
            raise InputError(f"windows_per_text is {self.windows_per_text}; give at least 1")
        if not self.copy_test and self.copy != CopyConfig():
            raise InputError("--copy is about how the texts of --copy-test are made; add --copy-test")
        if self.dense_prefix >= self.length:
            raise InputError(f"dense_prefix is {self.dense_prefix}, all of the {self.length} tokens; lower it")

    @property
    def length(self) -> int:
        """Return the tokens of each sequence."""
        return self.copy.length if self.copy_test else self.window

    @property
    def first_scored(self) -> int:
        """Return the first token of each sequence that is scored."""
        return self.copy.first_scored if self.copy_test else 1

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `EvalConfig`."""
        # a copy text is made of other texts too, so that none may be added
        return super().free_fields if self.copy_test else (*super().free_fields, "texts")


main = cli.main_of("eval.perplexity.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval perplexity`."""
    return cli.run(
        main,
        PerplexityConfig,
        "spotlight eval perplexity",
        __doc__,
        args,
        stored_by(PerplexityConfig),
    )
