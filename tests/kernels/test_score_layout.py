"""score_select's tensor-core layout, lane by lane: each thread must get the counts of its own tokens by both sums."""

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.kernels.score_select import scoring

LANES = np.arange(32)
GROUP, IN_GROUP = LANES >> 2, LANES & 3


def bits_of(words):
    """Bits `[..., 32]` of 32-bit words, the lowest first."""
    return (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1


def multiply(rows, columns):
    """mma.m16n8k128 (k256) as the PTX ISA lays it out, for a warp.

    Args:
        rows: of each lane, registers a0, a1 (a2, a3), uint32 `[32, 2 or 4]`.
        columns: registers b0 (b1), `[32, 1 or 2]`.

    Returns: of each lane, c0 to c3.
    """
    depth = 128 * columns.shape[1]
    a, b = np.zeros((16, depth), int), np.zeros((depth, 8), int)
    for lane, group, place in zip(LANES, GROUP, IN_GROUP, strict=True):
        for register in range(rows.shape[1]):
            row, first = group + 8 * (register % 2), 32 * place + 128 * (register // 2)
            a[row, first : first + 32] = bits_of(rows[lane, register])
        for register in range(columns.shape[1]):
            first = 32 * place + 128 * register
            b[first : first + 32, group] = bits_of(columns[lane, register])
    counts = a @ b
    return np.stack([counts[GROUP + 8 * (c // 2), 2 * IN_GROUP + c % 2] for c in range(4)], axis=1)


@pytest.mark.parametrize("words", [1, 2])
def test_every_lane_counts_its_own_tokens_by_both_sums(words):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**32, (32, words, scoring.TOKENS), dtype=np.uint32)
    planes = rng.integers(0, 2**32, (scoring.SUMS, words), dtype=np.uint32)
    owned = np.stack(list(scoring.owned_sums(jnp.asarray(LANES, jnp.int32))), axis=1)
    columns = np.where(owned[:, 0, None], planes[0], 0) | np.where(owned[:, 1, None], planes[1], 0)
    found = multiply(codes.reshape(32, -1), columns.astype(np.uint32))
    expected = bits_of(codes[:, :, :, None] & planes.T[None, :, None, :]).sum(axis=(1, -1))  # lane, token, sum
    np.testing.assert_array_equal(found, expected.reshape(32, -1))
