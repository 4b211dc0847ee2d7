"""How good each method's selections are: overlap with an oracle's, recall and attention mass, by layer and head.

    spotlight eval inspect --selector runs/demo --texts text:alice      # two CPU cores: 2 minutes
    spotlight eval inspect --selector runs/smollm2 --window 8192 --keep 0.02 0.05   # for a GPU

Queries spread over each window are taken from one dense pass, and every method chooses for the same ones. IoU and
recall are with `oracle-scores`, the tokens with the highest summed dot products, by the method's budget, sinks and
recent tokens, per KV head or per query head as the method chooses. A method can read more attention mass than it;
`oracle-mass` reads the most that a set of its size can hold. Means are over the layers that a method does not read
densely. `by_position` (and by_position.png) are the means over the queries of each part of the sequence.
"""

import dataclasses
from collections.abc import Sequence

from eval.common.flags import EvalConfig
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by


@dataclasses.dataclass(frozen=True)
class InspectConfig(EvalConfig):
    """What is looked at."""

    methods: tuple[str, ...] = ("oracle-scores", "spotlight", "lsh", "quest", "window")
    """Which methods choose; see `spotlight eval perplexity --help`."""
    texts: tuple[str, ...] = ("embedded-test",)
    """Text files, folders, globs, .npy files of token ids, hub data sets (hf:NAME[:CONFIG][:SPLIT]), embedded texts."""
    window: int = 2048
    """Tokens in one window."""
    windows_per_text: int = 1
    """Windows of each text, spread over it."""
    text_column: str = "text"
    """Key or column that holds the text in JSON, CSV, parquet and hub data sets; rows where it is null are left out."""
    queries: int = 256
    """Queries of each window, spread over it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be looked at."""
        super().__post_init__()
        if self.methods == ("dense",):
            raise InputError("dense selects nothing; give --methods at least one other")
        if not 1 <= self.queries <= self.window or self.windows_per_text < 1:
            raise InputError(
                f"queries is {self.queries}, window {self.window}, windows_per_text {self.windows_per_text}; "
                "give at least 1 of each, and no more queries than a window has tokens"
            )

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `EvalConfig`."""
        return (*super().free_fields, "texts")


main = cli.main_of("eval.inspect.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval inspect`."""
    return cli.run(main, InspectConfig, "spotlight eval inspect", __doc__, args, stored_by(InspectConfig))
