"""Prefill and decode at a model's shape, dense and sparse: tokens per second and peak memory.

    python -m eval.decode --preset smollm2-135m --lengths 7500                # two CPU cores: about three minutes
    python -m eval.decode --preset qwen2.5-7b --lengths 131072               # one 80 GB GPU
    python -m eval.decode --preset qwen2.5-7b --lengths 32768 24576 32000 16384

Weights and hash functions are random (times do not depend on them); `--model` and `--selector` take real ones. Each
length is one sequence of the batch. Dense and sparse steps are timed in turn, so that whatever else the machine does
falls on both. Single operations, and sweeps over lengths and batches: `eval.speed`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from spotlight_jax import cli
from spotlight_jax.config.generation import AttentionImpl
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.models.config import nearest
from spotlight_jax.models.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class DecodeSpeedConfig:
    """What is timed."""

    preset: str | None = None
    """Shape of the model, with random weights; without this, a model and a selector, smollm2-135m."""
    model: str | None = None
    """A real model instead; with a selector alone, the one it was trained for."""
    selector: Path | None = None
    """A trained selector instead of random hash functions: a folder, or hf:OWNER/NAME[@REVISION] of the hub."""
    lengths: tuple[int, ...] = (7500,)
    """Prompt tokens of each sequence of the batch."""
    new_tokens: int = 64
    """Steps timed per round."""
    rounds: int = 7
    """Rounds, dense and sparse in turn; medians are reported."""
    keep: float = 0.02
    """Share of the tokens that a query reads."""
    code_bits: int = 128
    """Bits of a code of the random hash functions."""
    dense_layers: tuple[int, ...] = SelectionConfig().dense_layers
    """Layers that sparse decoding reads densely; none with nothing after the flag."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floats of weights and cache; auto: bfloat16 on an accelerator, float32 on a CPU."""
    prefill_chunk: int | None = None
    """Prompt tokens per prefill step."""
    attention: AttentionImpl = "auto"
    """Implementation of dense attention."""
    skip_prefill: bool = False
    """Fill the cache with random numbers instead: the same decoding times, sooner."""
    methods: tuple[Literal["dense", "sparse", "sparse+tail"], ...] = ("dense", "sparse")
    """What to time; one alone gives its peak memory. With +tail, what is not read is estimated."""
    profile: bool = False
    """Trace one round more, and show what each kernel of a step took."""
    mesh: tuple[str, ...] = ()
    """Devices to spread the model over, such as model=2; without it, one."""

    @property
    def selection(self) -> SelectionConfig:
        """Return the selection of sparse decoding, at every length."""
        return SelectionConfig(keep=self.keep, min_context=0, dense_layers=self.dense_layers)

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        check_numbers(self)
        parse_mesh(self.mesh)  # refuses what is none
        if self.preset is not None and self.model is not None:
            raise InputError("--preset and --model both name what is timed; give one of them")
        if self.selector is not None and self.code_bits != DecodeSpeedConfig.code_bits:
            raise InputError(
                "--code-bits is of random hash functions, and --selector brings trained ones; give one of them"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"there is no preset {self.preset!r}{nearest(self.preset, tuple(PRESETS))}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError("give --methods some of dense, sparse and sparse+tail, each once")
        if not self.lengths or min(self.lengths) < 1 or self.new_tokens < 1 or self.rounds < 1:
            raise InputError("lengths, new_tokens and rounds must be at least 1")
        _ = self.selection  # refuses what selects nothing


main = cli.main_of("eval.speed.decode")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval decode`."""
    return cli.run(main, DecodeSpeedConfig, "spotlight eval decode", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
