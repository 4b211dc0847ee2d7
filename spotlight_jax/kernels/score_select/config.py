"""What the kernels are tuned by."""

import dataclasses

from spotlight_jax.kernels.configs import A100, H100, Capability

TOKENS = 8  # of a thread in each step of scoring: all that it has, as every instruction clears bins of its own


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages."""

    programs: int = 384  # at most, where chunks are long enough: three for each processor of an H100, all at work
    score_warps: int = 4  # few, each with many codes on their way: what scoring waits for is memory
    longest_chunk_steps: int = 14  # the ranks of so many fit the registers of the program that compacts them
    compact_warps: int = 8
    wide_step: int = 2048  # ranks that are compacted together; a chunk is one step of scoring or some wide ones
    stages: int = 1

    @property
    def step(self) -> int:
        """Tokens that a program scores together."""
        return TOKENS * 32 * self.score_warps

    @property
    def longest_chunk(self) -> int:
        """Tokens of a program, at most."""
        return self.longest_chunk_steps * self.step

    def choose_chunk(self, rows: int, kv_len: int) -> int:
        """Return the tokens of a program: few enough that a GPU is full, many enough that all programs run at once."""
        chunk = self.wide_step * -(-rows * kv_len // (self.programs * self.wide_step))
        return self.step if rows * kv_len <= self.programs * self.step else min(chunk, self.longest_chunk)


CONFIGS: dict[Capability | None, Config] = {A100: Config(), H100: Config(), None: Config()}
