"""What the kernel is tuned by."""

import dataclasses

from spotlight_jax.kernels.configs import A100, H100, Capability


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages."""

    tops: int = 4  # gone through at once: tops times others is what a program's threads hold
    least_others: int = 16  # that a row is padded to
    warps: int = 4
    stages: int = 1


CONFIGS: dict[Capability | None, Config] = {A100: Config(), H100: Config(), None: Config()}
