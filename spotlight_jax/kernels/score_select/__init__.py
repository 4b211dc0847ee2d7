"""From packed codes and query weights to the positions a decoding step reads: scoring, cut and compaction as one op."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from spotlight_jax.config.hashing import WORD_BITS
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.score_select.plan import MOST_BITS
from spotlight_jax.kernels.score_select.reference import score_select_in_parts
from spotlight_jax.kernels.trust import is_trusted
from spotlight_jax.weights import INT8_LIMIT, WeightBounds

__all__ = ["ScoreSelectImpl", "choose_impl", "score_select"]

ScoreSelectImpl = Literal["auto", "reference", "xla", "pallas_triton"]


def choose_impl(bounds: WeightBounds) -> ScoreSelectImpl:
    """Return what `auto` takes: the kernels on a GPU that passes their check, where they hold the weights and their
    scores; else the two parts, each as `auto` takes it."""
    fits = bounds.limit <= INT8_LIMIT and bounds.rank_bits <= MOST_BITS
    return "pallas_triton" if fits and is_trusted("score_select", _agree) else "xla"


def _run_kernels(
    codes: Array, weights: Array, ends: Array, budgets: Array, max_budget: int, bounds: WeightBounds,
    sink_tokens: int, recent_tokens: int, axis: str | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Run the kernels on weights of 8 bits; raises InputError where they cannot hold the weights or their scores."""
    if bounds.limit > INT8_LIMIT:
        raise InputError(f"weights up to {bounds.limit} do not fit int8 (at most {INT8_LIMIT})")
    if bounds.rank_bits > MOST_BITS:
        raise InputError(f"scores of weights that add up to {bounds.total} need more than {MOST_BITS} bits")
    call = codes, weights.astype(jnp.int8), ends, budgets, max_budget, bounds
    return score_select_pallas_triton(*call, sink_tokens, recent_tokens, axis)


def _agree() -> bool:
    """Return whether kernels and reference agree on ragged rows with ties and forced tokens, in several chunks."""
    batch, heads, kv_len = 16, 4, 25000
    keys = jax.random.split(jax.random.key(0), 4)
    codes = jax.random.bits(keys[0], (batch, 1, 2, kv_len), jnp.uint32)
    weights = jax.random.randint(keys[1], (batch, heads, 2, 64), -9, 10, jnp.int8)
    ends = jax.random.randint(keys[2], (batch,), kv_len // 2, kv_len + 1, jnp.int32)
    budgets = jax.random.randint(keys[3], (batch,), 10, 101, jnp.int32)
    bounds = WeightBounds(9, 9 * 64)
    run = functools.partial(score_select, max_budget=100, bounds=bounds, sink_tokens=2, recent_tokens=8)
    found, expected = (
        jax.jit(functools.partial(run, impl=impl))(codes, weights, ends, budgets)
        for impl in ("pallas_triton", "reference")
    )
    return all(bool(jnp.array_equal(*pair)) for pair in zip(found, expected, strict=True))


def score_select(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int[Array, "batch heads score_heads code_bits"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    bounds: WeightBounds,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    impl: ScoreSelectImpl = "auto",
    axis: str | None = None,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """Return positions of the tokens with the highest scores (see `weights`), newest first among equals.

    Args:
        codes: word-major packed codes; bit c of a code is bit c % 32 of word c // 32.
        weights: some sums for each selecting head; head h reads the codes of code head h // (heads // code_heads).
        ends: filled slots of each sequence, at least 1.
        budgets: tokens each head of a sequence reads, 1 to max_budget.
        max_budget: static width of the result.
        bounds: of the weights; with a limit of 1 every weight is +1 or -1.
        sink_tokens: first positions that are always chosen.
        recent_tokens: newest positions that are always chosen.
        impl: `auto` chooses by device and bounds; a named implementation runs or raises.
        axis: over which tokens are split (`token_axis`); each device gets its own of those chosen on all. The reference
            takes none.

    Returns: positions in ascending order, real ones first, and which are real; the others are 0.

    Raises:
        InputError: heads is no multiple of code_heads, the code widths differ, or the kernels are named and cannot hold
            the weights or their scores.
    """
    batch, code_heads, words, _ = codes.shape
    if weights.shape[0] != batch or weights.shape[1] % code_heads or weights.shape[3] != WORD_BITS * words:
        raise InputError(
            f"codes {codes.shape} and weights {weights.shape} do not fit: batch must be equal, heads a multiple of "
            f"code_heads ({code_heads}) and code_bits {WORD_BITS} x words ({WORD_BITS * words})"
        )
    backends: dict[str, Callable[..., tuple[Array, Array]]] = {
        "reference": functools.partial(score_select_in_parts, impl="reference"),
        "xla": functools.partial(score_select_in_parts, axis=axis),
        "pallas_triton": functools.partial(_run_kernels, axis=axis),
    }
    run = pick_backend("score_select", backends, impl, lambda: choose_impl(bounds), axis)
    return run(codes, weights, ends, budgets, max_budget, bounds, sink_tokens, recent_tokens)
