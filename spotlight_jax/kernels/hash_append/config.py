"""What the kernel is tuned by."""

import dataclasses

from spotlight_jax.kernels.configs import A100, H100, Capability


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages."""

    rows: int = 16  # of a product on tensor cores, at least: a row is one sum of one sequence
    depth: int = 32  # dimensions that are multiplied at once: registers hold their three parts
    code_bits: int = 64  # of a key, that one program finds at most
    warps: int = 8  # of a program, for codes of up to 128 bits
    wide_warps: int = 16  # for longer ones
    stages: int = 1


CONFIGS: dict[Capability | None, Config] = {A100: Config(), H100: Config(), None: Config()}
