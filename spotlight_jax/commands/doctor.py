"""Check this machine and installation: device, versions, what each op will use and why, memory, cache folder.

    spotlight doctor
    spotlight doctor --model random:qwen2.5-72b --tokens 32768 --sequences 4

With a model, also what each device holds to generate with it, for one mesh after another; no weights are read.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

from spotlight_jax import cli
from spotlight_jax.errors import InputError, check_numbers


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """How much to check."""

    run: bool = True
    """Run a small product on the device, to see that it works."""
    model: str | None = None
    """Model whose memory is shown for each mesh: a folder, a hub id, a .gguf file, or random:SHAPE."""
    tokens: int = 32768
    """Tokens of each of its sequences."""
    sequences: int = 1
    """Sequences that are decoded together."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of its weights and cache."""

    def __post_init__(self) -> None:
        """Refuse numbers that no sequences have."""
        check_numbers(self)
        if self.tokens < 1 or self.sequences < 1:
            raise InputError("tokens and sequences must be at least 1")


main = cli.main_of("spotlight_jax.commands.machine")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight doctor`."""
    return cli.run(main, DoctorConfig, "spotlight doctor", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
