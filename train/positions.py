"""Where in a long context the tokens of a short window stand, so that training sees positions up to any length.

Axes, levels and means of codes are fitted to keys after RoPE, and slow pairs of dimensions keep turning: keys beyond
the positions seen in fitting leave the fitted range, and a selector fails there in silence. RoPE is relative, so a
window may stand anywhere in the context; and where its positions jump, queries also see keys farther away than the
window is long (PoSE, arXiv 2309.10400, extends contexts by the same trick).
"""

import numpy as np
from jaxtyping import Int32

PIECES = 8  # of a window, each standing somewhere behind the one before it


def draw_positions(window: int, length: int, seed: int, number: int) -> Int32[np.ndarray, " window"]:
    """Draw ascending positions below `length` of the tokens of window `number`: a function of seed and number.

    The window is cut in `PIECES` at random places, and the room that `length` leaves is shared out between them at
    random. Where the window is as long as the context, positions are 0, 1, 2, ...
    """
    rng = np.random.default_rng((seed, number))
    pieces = min(PIECES, window)
    cuts = np.sort(rng.choice(np.arange(1, window), pieces - 1, replace=False))
    shifts = np.sort(rng.integers(0, length - window + 1, pieces))
    return _shift_pieces(window, cuts, shifts)


def far_positions(window: int, length: int) -> Int32[np.ndarray, " window"]:
    """Return positions of a window that reaches from the start of a context of `length` to its end, in even pieces."""
    pieces = min(PIECES, window)
    cuts = np.arange(1, pieces) * window // pieces
    shifts = np.linspace(0, length - window, pieces).round().astype(int)
    return _shift_pieces(window, cuts, shifts)


def _shift_pieces(window: int, cuts: np.ndarray, shifts: np.ndarray) -> Int32[np.ndarray, " window"]:
    sizes = np.diff([0, *cuts, window])
    return (np.arange(window) + np.repeat(shifts, sizes)).astype(np.int32)
