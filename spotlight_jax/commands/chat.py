"""Talk with a model in the terminal; the conversation so far stays in the cache.

    spotlight chat --selector runs/demo
    spotlight chat --url http://127.0.0.1:8000      # a server that runs already

An empty line does nothing, /new starts again, /help shows these, /quit or Ctrl-D ends, and Ctrl-C cuts an answer short.
"""

import dataclasses
import sys
from collections.abc import Sequence

from tyro.conf import OmitArgPrefixes

from spotlight_jax import cli, runs
from spotlight_jax.commands.flags import SessionConfig
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.errors import InputError

_ANSWERS = GenerateConfig(max_new_tokens=512)


@dataclasses.dataclass(frozen=True)
class ChatCommandConfig(SessionConfig):
    """How a conversation is held."""

    generation: OmitArgPrefixes[GenerateConfig] = dataclasses.field(default_factory=lambda: _ANSWERS)
    system: str = ""
    """System message before the conversation."""
    context: int | None = None
    """Most tokens of a conversation, for which memory is planned; None: the model's context."""
    report: bool = False
    """After each answer, say what it took."""
    url: str | None = None
    """Talk with the model of a running server (`spotlight serve`); its key is the environment's SPOTLIGHT_API_KEY."""

    def __post_init__(self) -> None:
        """Refuse what a server decides."""
        super().__post_init__()
        if self.url is None:
            return
        own = dataclasses.replace(
            self.generation,
            **{name: getattr(_ANSWERS, name) for name in ("max_new_tokens", "stop", "sampling")},
        )
        given = runs.differences(own, _ANSWERS) + [
            flag
            for flag, is_given in (
                ("--selector", self.selector is not None),
                ("--dtype", self.dtype != "auto"),
                ("--context", self.context is not None),
            )
            if is_given
        ]
        if given:
            raise InputError(f"{given[0]} is the server's choice; leave it out with --url, or start a server with it")
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"url is '{self.url}'; give one that begins with http:// or https://")


def main(cfg: ChatCommandConfig) -> object:
    """Talk until the input ends; JAX is imported only where the model runs here."""
    return cli.main_of("spotlight_jax.commands.talk" if cfg.url is None else "spotlight_jax.commands.remote")(cfg)


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight chat`."""
    return cli.run(main, ChatCommandConfig, "spotlight chat", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
