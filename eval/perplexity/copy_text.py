"""A passage, something else, and the passage again: its second half asks for tokens that are far away."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from spotlight_jax.errors import InputError, check_numbers


@dataclasses.dataclass(frozen=True)
class CopyConfig:
    """Sizes of a copy text; all of it is real text, nothing is padded."""

    passage: int = 1500
    """Tokens of the passage that comes twice."""
    filler: int = 1096
    """Tokens between its two copies, from another text (from elsewhere in the same one where there is one alone)."""

    def __post_init__(self) -> None:
        """Refuse passages that cannot be copied."""
        check_numbers(self)
        if self.passage < 2 or self.filler < 1:
            raise InputError(f"passage {self.passage} and filler {self.filler}: give at least 2 and 1 tokens")

    @property
    def window(self) -> int:
        """Return how many tokens a window of the source texts must have."""
        return max(self.passage, self.filler)

    @property
    def length(self) -> int:
        """Return the tokens of the whole."""
        return 2 * self.passage + self.filler

    @property
    def first_scored(self) -> int:
        """Return the first token of the second copy that the first copy predicts."""
        return self.passage + self.filler + 1


def copy_texts(
    windows: dict[str, Int32[np.ndarray, "windows window"]], cfg: CopyConfig
) -> dict[str, Int32[np.ndarray, "windows length"]]:
    """Make a copy text of each window: its start is the passage; the filler is the end of a window of the next text.

    Raises: InputError where there is one text with one window alone.
    """
    names = list(windows)
    found = {}
    for place, name in enumerate(names):
        other = windows[names[(place + 1) % len(names)]]
        rows = []
        for row, window in enumerate(windows[name]):
            filler = other[row % len(other)] if len(names) > 1 else other[(row + 1) % len(other)]
            if filler is window or (len(names) == 1 and len(other) == 1):
                raise InputError(f"'{name}' alone gives one window, and no other text to put between two copies of it")
            rows.append(np.concatenate([window[: cfg.passage], filler[-cfg.filler :], window[: cfg.passage]]))
        found[name] = np.stack(rows)
    return found
