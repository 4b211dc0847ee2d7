"""Talk with a model in the terminal; the talk so far stays in the cache.

    spotlight chat --selector runs/demo

An empty line does nothing, /new starts again, /help shows these, /quit or Ctrl-D ends, and Ctrl-C cuts an answer short.
"""

import dataclasses
import sys
from collections.abc import Sequence

from tyro.conf import OmitArgPrefixes

from spotlight_jax import cli
from spotlight_jax.commands.flags import SessionConfig
from spotlight_jax.config.generation import GenerateConfig


@dataclasses.dataclass(frozen=True)
class ChatCommandConfig(SessionConfig):
    """How to talk."""

    generation: OmitArgPrefixes[GenerateConfig] = dataclasses.field(
        default_factory=lambda: GenerateConfig(max_new_tokens=512)
    )
    system: str = ""
    """What the model is told before the talk."""
    context: int | None = None
    """Most tokens of a talk, for which memory is planned; None: the model's context."""
    report: bool = False
    """After each answer, say what it took."""


main = cli.main_of("spotlight_jax.commands.talk")


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight chat`."""
    return cli.run(main, ChatCommandConfig, "spotlight chat", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
