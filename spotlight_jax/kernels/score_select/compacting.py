"""Positions of the chosen ranks, side by side, in one walk: ties before the newest ones are counted and left out."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from spotlight_jax.kernels.score_select.plan import Plan, positions_of


def storer_of(
    cut: Int32[Array, ""],
    dropped: Int32[Array, ""],
    first_slot: Int32[Array, ""] | int,
    start: Int32[Array, ""] | int,
    threads: int,
    places_ref,
    plan: Plan,
):
    """The work of a walk over at most 65,535 ranks from position `start` on, which stores those that are chosen.

    Chosen are ranks above the cut, and those at it but for the first `dropped`. What is carried counts ranks above the
    cut and, sixteen bits higher, ties.
    """

    def store(step, ranks, before):
        ranks = ranks.astype(jnp.int32)
        counted = jnp.where(ranks > cut, 1, jnp.where(ranks == cut, 1 << 16, 0))
        reached = before + jnp.cumsum(counted)
        kept_ties = jnp.maximum(lax.shift_right_logical(reached, 16) - dropped, 0)
        is_chosen = ranks + jnp.minimum(kept_ties, 1) > cut
        slots = jnp.where(is_chosen, first_slot + (reached & 0xFFFF) + kept_ties - 1, plan.max_budget)
        call = slots, positions_of(start, step, ranks.size), is_chosen
        # a column holds the tokens of a thread, so that none are sent to others for the sake of slots side by side
        slots, places, is_chosen = (of_tokens.reshape(threads, -1).T for of_tokens in call)
        plgpu.store(places_ref.at[slots], places, mask=is_chosen)
        return before + jnp.sum(counted)

    return store
