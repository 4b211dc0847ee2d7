"""Check this machine and installation: device, versions, what each op will use and why, memory, cache folder.

spotlight doctor
"""

import dataclasses
import sys
from collections.abc import Sequence

from spotlight_jax import cli


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """How much to check."""

    run: bool = True
    """Run a small product on the device, to see that it works."""


main = cli.main_of("spotlight_jax.commands.machine")


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight doctor`."""
    return cli.run(main, DoctorConfig, "spotlight doctor", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
