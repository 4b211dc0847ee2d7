"""What the kernels are tuned by."""

import dataclasses

from spotlight_jax.kernels.configs import A100, H100, Capability


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages."""

    tile: int = 32  # tokens gathered at once
    rows: int = 16  # of a product on tensor cores, at least
    programs: int = 700  # about, where there are tiles for so many: several for each processor, all at work at once
    most_splits: int = 128  # of a row
    read_warps: int = 2
    read_stages: int = 2
    joined_by_warp: int = 1024  # numbers of a row's splits
    most_join_warps: int = 4
    join_stages: int = 1
    product_rows: int = 32  # of the moments, that one program multiplies with the queries


CONFIGS: dict[Capability | None, Config] = {A100: Config(), H100: Config(), None: Config()}
