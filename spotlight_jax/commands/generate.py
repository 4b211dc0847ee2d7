"""Continue a prompt, reading only the tokens that matter.

    spotlight generate --selector runs/demo --prompt-file book.txt --stream

Prints the text on stdout, and on stderr what it took: tokens per second of prompt and decoding, compile time apart, and
what a step read beside what a dense step reads. `--compare` generates densely too, and shows both side by side;
`--prompts FILE.jsonl --json` takes prompts and gives results as JSON lines. Seconds for a short prompt; on two CPUs
a prompt of 7,500 tokens takes SmolLM2 about a minute.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from spotlight_jax import cli
from spotlight_jax.commands.flags import SessionConfig
from spotlight_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GenerateCommandConfig(SessionConfig):
    """What to continue, and how to show it."""

    prompt: tuple[str, ...] = ()
    """Texts to continue; several are decoded together. Without any, what is piped in."""
    prompt_file: tuple[Path, ...] = ()
    """UTF-8 files to continue, after the texts; - is what is piped in."""
    prompts: Path | None = None
    """JSON lines instead, each with its text under `prompt`; with --json a line of results comes out for each."""
    prompt_tokens: int | None = None
    """Use only the first tokens of each prompt."""
    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message."""
    stream: bool = False
    """Show the text as it comes (one prompt)."""
    compare: bool = False
    """Generate densely as well and show both side by side; needs a selector."""
    json: bool = False
    """Print one line of JSON and nothing else on stdout: texts, token ids and the report; with --prompts a line for
    each prompt, in order."""

    def __post_init__(self) -> None:
        """Refuse what cannot be shown or continued."""
        super().__post_init__()
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise InputError(f"prompt_tokens is {self.prompt_tokens}; give at least 1")
        if self.prompts is not None and (self.prompt or self.prompt_file):
            raise InputError("--prompts is a file of all prompts; leave out --prompt and --prompt-file")
        if self.compare and self.selector is None:
            raise InputError("--compare sets a selector beside dense reading; give --selector")
        if self.json and self.stream:
            raise InputError("--json prints the result as a whole; leave out --stream")
        if self.compare and self.stream:
            raise InputError("--compare shows two texts side by side; leave out --stream")


main = cli.main_of("spotlight_jax.commands.completion")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight generate`."""
    return cli.run(main, GenerateCommandConfig, "spotlight generate", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
