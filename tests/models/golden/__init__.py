"""Logits that transformers and torch gave, recorded by `tests/parity` with `--record`; read by the default tests."""

import pathlib

import numpy as np

from tests.models import tiny

_FOLDER = pathlib.Path(__file__).parent
_POSITION_STEP, _VOCAB_STEP = 64, 512  # which of SmolLM2's logits are kept


def write_tiny(case: str, logits: np.ndarray) -> None:
    """Keep the logits of a few positions of both sequences."""
    np.save(_FOLDER / f"{case}.npy", logits[:, list(tiny.KEPT_POSITIONS)].astype(np.float32))


def read_tiny(case: str) -> np.ndarray:
    """Logits `[BATCH, positions, VOCAB]`."""
    return np.load(_FOLDER / f"{case}.npy")


def write_smollm2(tokens: np.ndarray, logits: np.ndarray) -> None:
    """Keep the ids, the most probable next id everywhere, and a grid of logits."""
    np.savez_compressed(
        _FOLDER / "smollm2.npz",
        tokens=tokens.astype(np.int32),
        argmax=logits.argmax(-1).astype(np.int32),
        logits=sample_smollm2(logits).astype(np.float32),
    )


def sample_smollm2(logits: np.ndarray) -> np.ndarray:
    """The grid of logits that is kept."""
    return logits[_POSITION_STEP - 1 :: _POSITION_STEP, ::_VOCAB_STEP]


def read_smollm2() -> dict[str, np.ndarray]:
    """`tokens [1024]`, `argmax [1024]`, `logits [16, 96]`."""
    with np.load(_FOLDER / "smollm2.npz") as file:
        return dict(file)
