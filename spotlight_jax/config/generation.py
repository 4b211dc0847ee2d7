"""How text is continued."""

import dataclasses
from typing import Literal

from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.token_ids import check_text

AttentionImpl = Literal["auto", "xla", "cudnn"]
MOST_STOPS = 32  # ids that can end a sequence: a step compares with so many, whoever asked for how many


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Settings that a compiled decoding step depends on, apart from shapes."""

    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    prefill_chunk: int | None = None
    """Prompt tokens per prefill step; None: by device."""
    block: int = 32
    """Most tokens decoded on the device between two looks of the host."""
    attention: AttentionImpl = "auto"
    """Implementation of dense attention."""
    tail: bool = True
    """Estimate the attention to tokens that are not read, where the selector was trained for that."""

    def __post_init__(self) -> None:
        """Refuse chunks and blocks of nothing."""
        check_numbers(self)
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise InputError(f"prefill_chunk is {self.prefill_chunk}; give at least 1 token")
        if self.block < 1:
            raise InputError(f"block is {self.block}; give at least 1 token")


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Settings of one sequence of a batch; all sequences share a compiled step."""

    sampling: SamplingConfig = SamplingConfig()
    stop_tokens: tuple[int, ...] = ()
    """Ids that end the sequence; it keeps the first of them."""
    number: int = 0
    """Number of the sequence among those of one seed, which draw apart from each other."""

    def __post_init__(self) -> None:
        """Refuse more stop tokens than a step looks for."""
        check_numbers(self)
        if len(self.stop_tokens) > MOST_STOPS:
            raise InputError(f"{len(self.stop_tokens)} tokens end a text; give at most {MOST_STOPS}")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Settings of generation: lengths, stop strings, sampling, and which tokens are read."""

    max_new_tokens: int = 128
    """Most tokens after each prompt."""
    stop: tuple[str, ...] = ()
    """Strings of which the first to appear ends a text; it is left out. A special token's name stands for the token."""
    ignore_eos: bool = False
    """Go on after the tokens that the model ends a text or a turn with."""
    prefill_chunk: int | None = None
    """Prompt tokens per prefill step; None: by device."""
    block: int = 32
    """Tokens decoded on the device between two looks of the host."""
    tail: bool = True
    """Estimate the attention to tokens that are not read, where the selector was trained for that."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        """Refuse a generation of nothing, and stop strings that are none."""
        check_numbers(self)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop is {self.stop!r}; give strings in a list, such as ('END',)")
        if "" in self.stop:
            raise InputError("a stop string is empty, which every text holds; leave it out")
        for text in self.stop:
            check_text(text, "a stop string")
        object.__setattr__(self, "stop", tuple(self.stop))
        make_decode_config(self)  # refuses chunks and blocks of nothing


def make_decode_config(cfg: GenerateConfig) -> DecodeConfig:
    """Return the part of the settings that a step is compiled for."""
    return DecodeConfig(selection=cfg.selection, prefill_chunk=cfg.prefill_chunk, block=cfg.block, tail=cfg.tail)
