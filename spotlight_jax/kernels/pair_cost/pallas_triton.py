"""Pair sums in one pass of one kernel: a program a row, its others in registers, its tops a few at a time."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.pair_cost.config import CONFIGS
from spotlight_jax.kernels.pair_cost.factors import pair_factors
from spotlight_jax.kernels.pair_cost.reference import PairSums
from spotlight_jax.kernels.triton import Ref


def _approximate(operation: str, x: Float[Array, "tops others"], interpret: bool) -> Float[Array, "tops others"]:
    """Run one PTX instruction a pair, right to about 1e-7: exact logarithms and divisions would be most of the work."""
    if interpret:
        return {"lg2": jnp.log2, "rcp": jnp.reciprocal}[operation](x)
    [result] = plgpu.elementwise_inline_asm(
        f"{operation}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def _kernel(
    tops_ref: Ref, weights_ref: Ref, others_ref: Ref,
    cost_ref: Ref, wrong_ref: Ref, top_slopes_ref: Ref, other_slopes_ref: Ref,
    *, lost: float, at_once: int, interpret: bool,
) -> None:  # fmt: skip
    others = others_ref[0, :][None, :]

    def add_tops(step: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cost, wrong, slopes = sums
        at = pl.ds(step * at_once, at_once)
        tops, weights = tops_ref[0, at], weights_ref[0, at]
        least = jnp.where(weights > 0, lost, jnp.inf)[:, None]  # ratio of a pair that is ranked wrongly
        ratio = tops[:, None] * others
        sum_ = 1.0 + ratio
        share = _approximate("rcp", sum_, interpret)
        weighted = weights * tops
        top_slopes_ref[0, at] = -weighted * jnp.sum(others * share, axis=1)
        return (
            cost + jnp.sum(weights[:, None] * _approximate("lg2", sum_, interpret), axis=0),
            wrong + jnp.sum(jnp.where(ratio > least, 1.0, 0.0), axis=0),
            slopes + jnp.sum(weighted[:, None] * share, axis=0),
        )

    zeros = jnp.zeros(others_ref.shape[1:], jnp.float32)
    cost, wrong, slopes = jax.lax.fori_loop(0, tops_ref.shape[1] // at_once, add_tops, (zeros, zeros, zeros))
    cost_ref[0] = jnp.sum(cost) * math.log(2)
    wrong_ref[0] = jnp.sum(wrong)
    other_slopes_ref[0, :] = others_ref[0, :] * slopes


def pair_sums_pallas_triton(
    top_scores: Float[Array, "*batch tops"],
    top_weights: Float[Array, "*batch tops"],
    other_scores: Float[Array, "*batch others"],
    is_other: Bool[Array, "*batch others"],
    alpha: float,
    interpret: bool = False,
) -> PairSums:
    """Compute `pair_sums`; tops and others are padded with keys that are in no pair."""
    cfg = config_here(CONFIGS)
    batch, count = top_scores.shape[:-1], other_scores.shape[-1]
    tops, others = pair_factors(top_scores, other_scores, is_other, alpha)
    width = max(cfg.least_others, 1 << (count - 1).bit_length())  # what a program holds at once must be a power of two
    tops, weights = _padded_rows(tops, cfg.tops), _padded_rows(top_weights, cfg.tops)
    others = _padded_rows(others, width)
    rows = tops.shape[0]

    def row_of(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, width), lambda row: (row, 0))

    def row_shape(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32)

    one = pl.BlockSpec((1,), lambda row: (row,))
    cost, wrong, top_slopes, other_slopes = pl.pallas_call(
        functools.partial(_kernel, lost=math.exp(alpha), at_once=cfg.tops, interpret=interpret),
        grid=(rows,),
        in_specs=[row_of(tops.shape[1]), row_of(tops.shape[1]), row_of(others.shape[1])],
        out_specs=[one, one, row_of(tops.shape[1]), row_of(others.shape[1])],
        out_shape=[row_shape(), row_shape(), row_shape(tops.shape[1]), row_shape(others.shape[1])],
        compiler_params=plgpu.CompilerParams(num_warps=cfg.warps, num_stages=cfg.stages),
        interpret=interpret,
        name="pair_sums",
    )(tops, weights, others)
    return PairSums(
        cost=cost.reshape(batch),
        wrong=wrong.reshape(batch),
        top_slopes=top_slopes[:, : top_scores.shape[-1]].reshape(top_scores.shape),
        other_slopes=other_slopes[:, :count].reshape(other_scores.shape),
    )


def _padded_rows(x: Float[Array, "*batch width"], multiple: int) -> Float[Array, "rows padded"]:
    """Return rows of a width that is a multiple of some number, zeros at the end."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple)))
