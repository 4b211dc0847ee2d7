"""Ranks of the tokens that are read whatever their score, and of slots that hold none."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32


def force_ranks(
    ranks: UInt32[Array, "*rows kv_len"],
    ends: Int32[Array, "*rows"],
    always: int,
    sink_tokens: int,
    recent_tokens: int,
    first: Int32[Array, ""] | int = 0,
) -> UInt32[Array, "*rows kv_len"]:
    """Return the ranks with `always` for sinks and the newest tokens, and 0 for slots from each row's end on.

    Args:
        first: position of the first slot.
    """
    positions = first + jnp.arange(ranks.shape[-1], dtype=jnp.int32).reshape((1,) * (ranks.ndim - 1) + (-1,))
    ends = ends[..., None]
    is_always_read = (positions < sink_tokens) | (positions >= ends - recent_tokens)
    ranks = jnp.where(is_always_read, jnp.uint32(always), ranks)
    return jnp.where(positions < ends, ranks, jnp.uint32(0))
