"""Send a selector to Hugging Face's hub, where others name it as `--selector hf:OWNER/NAME`.

    spotlight push --selector runs/mine --to OWNER/NAME --dry-run      shows what would be sent, and sends nothing
    spotlight push --selector runs/mine --to OWNER/NAME

Sends `selector.safetensors`, `config.json`, a manifest of their hashes and a model card with the measured quality;
local paths are cut to their last part. Log in before with `hf auth login`, or set HF_TOKEN to a token that may write.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from spotlight_jax import cli
from spotlight_jax.errors import InputError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """What is sent, and where it goes."""

    selector: Path
    """What training wrote: a run or its selector folder."""
    to: str
    """Repository on the hub, OWNER/NAME; it is made where there is none."""
    base_model: str | None = None
    """The base model's own id on the hub; needed where the selector was trained for a local folder or file."""
    private: bool = False
    """Make a new repository private; one that is there stays as it is."""
    dry_run: bool = False
    """Show the files, their bytes and the card, and send nothing."""

    def __post_init__(self) -> None:
        """Refuse what is no repository of the hub."""
        for flag, name in (("--to", self.to), ("--base-model", self.base_model)):
            if name is not None and not _HUB_ID.fullmatch(name):
                raise InputError(f"{flag} is '{name}'; give OWNER/NAME, as the hub calls it")


main = cli.main_of("spotlight_jax.commands.publish")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight push`."""
    return cli.run(main, PushConfig, "spotlight push", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
