"""Exact top-budget selection by counting, never sorting: highest ranks, newest first among equals."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from spotlight_jax.config.hashing import WORD_BITS
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.select_top.counting import compact_mask, find_cut, own_budgets
from spotlight_jax.kernels.select_top.reference import select_top_reference

__all__ = ["SelectTopImpl", "choose_impl", "mask_top", "select_top"]

SelectTopImpl = Literal["auto", "reference", "counting"]


def choose_impl() -> SelectTopImpl:
    """Return what `auto` takes: counting, on any device."""
    return "counting"


def _digit_bits() -> int:
    """Return the bits of the cut found per pass: more comparisons a pass pay where a pass costs a kernel launch."""
    return 1 if jax.default_backend() == "cpu" else 2


def _check(ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int) -> None:
    """Refuse shapes that do not fit and widths that cannot be searched."""
    if budgets.shape != ranks.shape[:-1]:
        raise InputError(f"ranks {ranks.shape} need one budget per row, got budgets {budgets.shape}")
    if not 1 <= rank_bits <= WORD_BITS:
        raise InputError(f"rank_bits is {rank_bits}; ranks are uint32, so give 1 to {WORD_BITS}")


def _pad(ranks: UInt32[Array, "*rows kv_len"]) -> UInt32[Array, "*rows padded"]:
    """Fill up the last word of the packed mask with positions that are never chosen."""
    missing = -ranks.shape[-1] % WORD_BITS
    return jnp.pad(ranks, [(0, 0)] * (ranks.ndim - 1) + [(0, missing)]) if missing else ranks


def select_top(
    ranks: UInt32[Array, "*rows kv_len"],
    budgets: Int32[Array, "*rows"],
    max_budget: int,
    rank_bits: int = WORD_BITS,
    impl: SelectTopImpl = "auto",
    axis: str | None = None,
) -> tuple[Int32[Array, "*rows max_budget"], Bool[Array, "*rows max_budget"]]:
    """Return positions of the `budgets` highest ranks of each row.

    Args:
        ranks: a position of rank 0 is never chosen; equal ranks go to the newest (largest) position.
        budgets: how many to choose in each row, at most max_budget; a row with fewer ranks above 0 gives them all.
        max_budget: static width of the result.
        rank_bits: ranks are below 2^rank_bits; fewer bits mean fewer passes.
        impl: `auto` counts; a named implementation runs or raises.
        axis: over which positions are split (`token_axis`); each device gets its own of those chosen on all. `counting`
            alone takes one.

    Returns: positions in ascending order, real ones first, and which are real; the others are 0.
    """
    _check(ranks, budgets, rank_bits)
    backends: dict[str, Callable[..., tuple[Array, Array]]] = {
        "reference": select_top_reference,
        "counting": functools.partial(_select_by_counting, rank_bits=rank_bits, axis=axis),
    }
    return pick_backend("select_top", backends, impl, choose_impl, axis)(ranks, budgets, max_budget)


def _select_by_counting(
    ranks: UInt32[Array, "*rows kv_len"],
    budgets: Int32[Array, "*rows"],
    max_budget: int,
    rank_bits: int,
    axis: str | None,
) -> tuple[Int32[Array, "*rows max_budget"], Bool[Array, "*rows max_budget"]]:
    """Find the cut, on one device of several that of its own share, and compact it."""
    if axis is not None:
        budgets = own_budgets(ranks, budgets, rank_bits, _digit_bits(), axis)
    cut = find_cut(_pad(ranks), budgets, rank_bits, _digit_bits())
    return compact_mask(cut, budgets, max_budget)


def mask_top(
    ranks: UInt32[Array, "*rows kv_len"], budgets: Int32[Array, "*rows"], rank_bits: int = WORD_BITS
) -> Bool[Array, "*rows kv_len"]:
    """Return the choice of `select_top`, from the same cut, as a mask: for many queries, each with its budget."""
    _check(ranks, budgets, rank_bits)
    cut = find_cut(_pad(ranks), budgets, rank_bits, _digit_bits())
    positions = jnp.arange(ranks.shape[-1], dtype=jnp.int32).reshape((1,) * (ranks.ndim - 1) + (-1,))
    is_tie = ranks == cut.threshold[..., None]
    return (ranks > cut.threshold[..., None]) | (is_tie & (positions >= cut.oldest[..., None]))
