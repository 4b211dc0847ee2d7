"""Which text is read."""

import dataclasses

from spotlight_jax.errors import InputError, check_numbers

EMBEDDED = "embedded"  # the whole training mix


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text to train on and which to keep for measuring."""

    train: tuple[str, ...] = (EMBEDDED,)
    """Training text: .txt, .md, .jsonl, .json, .csv, .parquet (.gz, .bz2, .xz, .zst too) or .npy (token ids) files,
    folders, globs, hub data sets (hf:NAME[:CONFIG][:SPLIT]), or `embedded` (a mix that is fetched once)."""
    held_out: tuple[str, ...] = ()
    """Text to measure on, given in the same way; without it, windows spread over the training text are set aside."""
    window: int = 2048
    """Tokens in one window."""
    held_out_windows: int = 8
    """Windows to measure on."""
    weights: tuple[float, ...] = ()
    """Share of the windows for each training text, in the same order; without it, by size."""
    text_column: str = "text"
    """Key or column that holds the text in JSON, CSV, parquet and hub data sets; rows where it is null are left out."""
    copies: float = 0.0
    """Share of the training windows in which a passage comes a second time, in place of what was there: what a model
    copies, it must find far back, and few windows of plain text ask for that."""
    seed: int = 0
    """Seed of the training order; the held-out windows do not depend on it."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.train:
            raise InputError("no training text is given; name a file, or 'embedded'")
        if self.window < 2:
            raise InputError(f"window must be at least 2 tokens, not {self.window}")
        if self.held_out_windows < 0:
            raise InputError(f"held_out_windows must not be negative, not {self.held_out_windows}")
        if self.weights and len(self.weights) != len(self.train):
            raise InputError(f"weights has {len(self.weights)} numbers for {len(self.train)} training texts")
        if not 0 <= self.copies <= 1:
            raise InputError(f"copies is {self.copies}; give a share of the windows from 0 to 1")
        if any(weight <= 0 for weight in self.weights):
            raise InputError(f"weights must be positive, not {self.weights}")
