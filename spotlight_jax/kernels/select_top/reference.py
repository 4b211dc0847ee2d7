"""What a selection means: sort by rank, then by position, newest first, and keep the front."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32


def select_top_reference(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], max_budget: int
) -> tuple[Int32[Array, "*rows max_budget"], Bool[Array, "*rows max_budget"]]:
    """Compute `select_top` by sorting."""
    kv_len = ranks.shape[-1]
    ascending = jnp.argsort(ranks, axis=-1, stable=True)  # equal ranks: oldest first
    best_first = jnp.flip(ascending, axis=-1)
    order = jnp.arange(kv_len, dtype=jnp.int32).reshape((1,) * (ranks.ndim - 1) + (-1,))
    is_chosen = (order < budgets[..., None]) & (jnp.take_along_axis(ranks, best_first, axis=-1) > 0)
    chosen = jnp.sort(jnp.where(is_chosen, best_first.astype(jnp.int32), kv_len), axis=-1)
    width = max(max_budget - kv_len, 0)
    chosen = jnp.pad(chosen, [(0, 0)] * (ranks.ndim - 1) + [(0, width)], constant_values=kv_len)[..., :max_budget]
    return jnp.where(chosen < kv_len, chosen, 0), chosen < kv_len
