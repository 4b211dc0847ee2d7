"""Which cached tokens one query reads: its budget, the tokens it always reads, and the choice of the rest.

One rule for decoding and for teacher-forced evaluation: both rank the tokens here and cut them by counting
(`kernels/select_top`), so that they select the same tokens.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from spotlight_jax.config.selection import LONGEST, SHARE_STEPS, SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.score_select import score_select
from spotlight_jax.kernels.select_top import mask_top, select_top
from spotlight_jax.kernels.select_top.ranks import force_ranks
from spotlight_jax.token_axis import devices_of, first_slot
from spotlight_jax.weights import WeightBounds

THOUSAND = 1_000
# Shortest cache, in tokens times batch, that a sparse step reads faster than a dense one; measured, docs/performance.md
CROSSOVER = {"cpu": 2_048, "gpu": 32_768}


@flax.struct.dataclass
class RowBudgets:
    """Budgets of the sequences of a batch, each by its own rule, within that of the compiled step."""

    dropped: Int32[Array, "batch"]  # see `budget_rule`
    least: Int32[Array, "batch"]
    sparse_from: Int32[Array, "batch"]  # shortest sequence that is read sparsely

    def at(self, lengths: Int32[Array, "batch"]) -> Int32[Array, "batch"]:
        """Return the tokens that each sequence reads out of `lengths`."""
        return apply_rule(lengths, self.dropped, self.least)


def row_budgets(configs: Sequence[SelectionConfig], batch: int, platform: str) -> RowBudgets:
    """Return the budgets of some sequences as arrays.

    Args:
        configs: one for each sequence.
        batch: sequences of a step, which `sparse_from` goes by.
        platform: of the device.
    """
    dropped, least = zip(*map(budget_rule, configs), strict=True)
    starts = [sparse_from(cfg, batch, platform) for cfg in configs]
    return RowBudgets(*(jnp.asarray(numbers, jnp.int32) for numbers in (dropped, least, starts)))


def budget_rule(cfg: SelectionConfig) -> tuple[int, int]:
    """Return the millionths of a sequence's tokens that are left out, and the least that is read."""
    if cfg.budget is not None:
        return SHARE_STEPS, cfg.budget
    return SHARE_STEPS - round(cfg.share * SHARE_STEPS), max(cfg.min_tokens, cfg.always_read)


def apply_rule(lengths: Any, dropped: Int32[Array, "*rows"] | int, least: Int32[Array, "*rows"] | int) -> Any:
    """Return the tokens read of `lengths`, `int32[*rows]`: n - floor(dropped n), or the least; never more than exist.

    The share is counted in whole millionths: exact for every n up to 2,000,000, on any device, and on the host for
    lengths of NumPy's.
    """
    xp = np if isinstance(lengths, np.ndarray) else jnp
    whole, rest = dropped // THOUSAND, dropped % THOUSAND  # in two steps, because n * dropped passes 32 bits
    left_out = (lengths * whole + lengths * rest // THOUSAND) // THOUSAND
    return xp.minimum(xp.maximum(lengths - left_out, least), lengths)


def budget_of(lengths: Int[Array, "*rows"] | int, cfg: SelectionConfig) -> Int32[Array, "*rows"]:
    """Return the tokens read out of `lengths`: a share or a fixed number, at least what is always read, at most all."""
    return apply_rule(jnp.asarray(lengths, jnp.int32), *budget_rule(cfg))


def share_read(lengths: Int[np.ndarray, " queries"], cfg: SelectionConfig) -> float:
    """Return the share of their tokens that queries over these lengths read together: above `keep` at a minimum."""
    return float(np.sum(budget_of(jnp.asarray(lengths), cfg))) / float(np.sum(lengths))


def max_budget(max_len: int, cfg: SelectionConfig) -> int:
    """Return the largest budget of a cache of `max_len` slots: the static width of a selection."""
    if max_len > LONGEST:
        raise InputError(f"a cache of {max_len} tokens is longer than the {LONGEST} that budgets are exact for")
    with jax.ensure_compile_time_eval():
        return int(budget_of(max_len, cfg))


def sparse_from(cfg: SelectionConfig, batch: int, platform: str) -> int:
    """Return the least length of a sequence that is read sparsely: where tokens are left out and reading fewer pays.

    Args:
        platform: of the device, as JAX names it ("cpu", "gpu"); one that was never measured counts as a GPU.
    """
    if cfg.budget is None and cfg.share == 1:
        return LONGEST + 1
    measured = CROSSOVER.get(platform, CROSSOVER["gpu"]) // batch
    shortest = measured if cfg.min_context == "auto" else cfg.min_context
    everything = cfg.budget if cfg.budget is not None else max(cfg.min_tokens, cfg.always_read)
    return max(shortest, everything + 1)


def ordered_ranks(scores: Float[Array, "*rows kv_len"]) -> UInt32[Array, "*rows kv_len"]:
    """Map floats to integers in the same order; neither 0 nor the largest word is any number's (-inf is the lowest)."""
    scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 ties with 0.0
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def rank_tokens(
    scores: Int32[Array, "*rows kv_len"] | Float[Array, "*rows kv_len"],
    lengths: Int32[Array, "*rows"],
    cfg: SelectionConfig,
    score_range: tuple[int, int] | None = None,
    first: Int32[Array, ""] | int = 0,
) -> tuple[UInt32[Array, "*rows kv_len"], int]:
    """Return ranks to select by: 0 for slots past each row's length, the highest for tokens that are always read.

    Args:
        score_range: least and greatest integer score; not used for floats, whose order is kept exactly.
        first: position of the first slot.

    Returns: the ranks, and how many bits hold them.
    """
    if jnp.issubdtype(scores.dtype, jnp.floating):
        ranks, always, rank_bits = ordered_ranks(scores), 0xFFFFFFFF, 32
    else:
        if score_range is None:
            raise InputError("integer scores need a score_range")
        least, greatest = score_range
        always = greatest - least + 2
        rank_bits = always.bit_length()
        ranks = (scores - least + 1).astype(jnp.uint32)
    return force_ranks(ranks, lengths, always, cfg.sink_tokens, max(cfg.recent_tokens, 1), first), rank_bits


def select_tokens(
    scores: Int32[Array, "batch heads max_len"] | Float[Array, "batch heads max_len"],
    lengths: Int32[Array, "batch"],
    cfg: SelectionConfig,
    score_range: tuple[int, int] | None = None,
    budgets: Int32[Array, "batch"] | None = None,
    axis: str | None = None,
) -> tuple[Int32[Array, "batch heads budget"], Bool[Array, "batch heads budget"]]:
    """Return the positions that each newest token reads: highest scores, newest first among equals, itself always.

    Args:
        lengths: filled slots, the newest token's included; each sequence's budget comes from its own.
        score_range: least and greatest score, where scores are integers.
        budgets: of each sequence, at most the cache's largest; None: what `cfg` says for its length.
        axis: over which slots are split (`token_axis`); each device gets what it holds of the choice.

    Returns:
        Positions in ascending order, and whether each is real (False where a sequence's budget is smaller than the
            cache's largest); positions that are not real are 0.
    """
    rows = jnp.broadcast_to(lengths[:, None], scores.shape[:2])
    slots = scores.shape[-1]
    ranks, rank_bits = rank_tokens(scores, rows, cfg, score_range, first_slot(slots, axis))
    most = max_budget(slots * devices_of(axis), cfg)
    counts = budget_of(rows, cfg) if budgets is None else jnp.broadcast_to(budgets[:, None], rows.shape)
    return select_top(ranks, jnp.minimum(counts, most), min(most, slots), rank_bits, axis=axis)


def select_by_codes(
    codes: UInt32[Array, "batch code_heads words max_len"],
    weights: Int[Array, "batch heads score_heads code_bits"],
    bounds: WeightBounds,
    lengths: Int32[Array, "batch"],
    cfg: SelectionConfig,
    budgets: Int32[Array, "batch"] | None = None,
    axis: str | None = None,
) -> tuple[Int32[Array, "batch heads budget"], Bool[Array, "batch heads budget"]]:
    """Return what `select_tokens` gives for these weights' scores (see `weights`), from codes to positions in one op.

    Args:
        weights: of the newest token's query, some sums for each selecting head.
        bounds: of the weights.
        lengths: filled slots, the newest token's included.
        budgets: of each sequence, at most the cache's largest; None: what `cfg` says for its length.
        axis: as in `select_tokens`.
    """
    slots, recent = codes.shape[-1], max(cfg.recent_tokens, 1)
    most = max_budget(slots * devices_of(axis), cfg)
    counts = budget_of(lengths, cfg) if budgets is None else jnp.minimum(budgets, most)
    call = codes, weights, lengths, counts, min(most, slots), bounds, cfg.sink_tokens, recent
    return score_select(*call, axis=axis)


def select_mask(
    scores: Int32[Array, "batch q_len heads kv_len"] | Float[Array, "batch q_len heads kv_len"],
    positions: Int32[Array, "batch q_len"],
    cfg: SelectionConfig,
    score_range: tuple[int, int] | None = None,
    budgets: Int32[Array, "batch q_len"] | None = None,
) -> Bool[Array, "batch q_len heads kv_len"]:
    """Return what `select_tokens` gives at each of many steps at once: teacher-forced evaluation.

    Args:
        positions: of the queries; a query reads from positions up to its own.
        score_range: least and greatest score, where scores are integers.
        budgets: tokens each query reads, all it sees where that is fewer; without them, the budget of those it sees.
    """
    rows = jnp.broadcast_to(positions[:, :, None] + 1, scores.shape[:3])
    ranks, rank_bits = rank_tokens(scores, rows, cfg, score_range)
    counts = budget_of(positions + 1, cfg) if budgets is None else budgets
    return mask_top(ranks, jnp.minimum(counts[:, :, None], rows), rank_bits)
