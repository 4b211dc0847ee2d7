"""Sparse attention in two kernels: every program gathers and reads some of a row's tokens, then rows are put together.

A row is one selection: of a KV head, whose query heads then share its keys and values, or of a query head.
`read_selected` is the same two kernels, which then also make moments.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.sparse_attention.config import CONFIGS, Config
from spotlight_jax.kernels.sparse_attention.moments import make_moments, sum_tile
from spotlight_jax.kernels.sparse_attention.reads import Reads

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call."""

    heads: int
    kv_heads: int
    group: int  # query heads of a selection
    head_dim: int
    width: int  # head_dim, up to a power of two
    budget: int
    tiles: int  # of one program
    splits: int
    moments: bool  # whether they are made
    cfg: Config

    @property
    def lanes(self) -> int:
        """Width of vectors over splits: a power of two."""
        return _power_of_two(self.splits)

    @property
    def join_warps(self) -> int:
        """Of a program that joins splits: one where it can hold them, which waits for no other."""
        return min(self.cfg.most_join_warps, max(1, self.lanes * self.width // self.cfg.joined_by_warp))

    @property
    def rows(self) -> int:
        """Query heads of a selection, filled up for the tensor cores."""
        return max(self.cfg.rows, _power_of_two(self.group))


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()


def _zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def _read_kernel(
    queries_ref, keys_ref, values_ref, indices_ref, is_real_ref, mean_refs,
    sums_ref, most_ref, totals_ref, moment_refs, *, plan,
):  # fmt: skip
    row, split = pl.program_id(0), pl.program_id(1)
    sequence, head = row // plan.heads, row % plan.heads
    kv_head = head // (plan.heads // plan.kv_heads)
    of_group, lanes = jnp.arange(plan.rows), jnp.arange(plan.width)
    is_dim = lanes < plan.head_dim
    is_query = (of_group < plan.group)[:, None] & is_dim[None, :]
    queries = plgpu.load(queries_ref.at[of_group[:, None], lanes[None, :]], mask=is_query, other=0.0)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    moments = ()
    if plan.moments:
        mean_logits = plgpu.load(mean_refs[0].at[of_group], mask=of_group < plan.group, other=0.0)
        mean_values = plgpu.load(mean_refs[1].at[sequence, kv_head, lanes], mask=is_dim, other=0.0)
        moments = make_moments(_zeros, functools.partial(_zeros, plan.rows), plan.width)

    def read_tile(tile, carry):
        most, total, sums, moments = carry
        slots = (split * plan.tiles + tile) * plan.cfg.tile + jnp.arange(plan.cfg.tile)
        is_slot = slots < plan.budget
        is_real = plgpu.load(is_real_ref.at[slots], mask=is_slot, other=0) != 0
        places = plgpu.load(indices_ref.at[slots], mask=is_slot, other=0)
        at = (sequence, places[:, None], kv_head, lanes[None, :])
        is_there = is_real[:, None] & is_dim[None, :]
        keys = plgpu.load(keys_ref.at[at], mask=is_there, other=0.0)
        values = plgpu.load(values_ref.at[at], mask=is_there, other=0.0)  # asked for before the keys are there
        scores = plgpu.dot(queries, keys, trans_b=True, precision=precision) * plan.head_dim**-0.5
        scores = jnp.where(is_real[None, :], scores, MASKED)
        raised = jnp.maximum(most, jnp.max(scores, axis=1))
        shares = jnp.where(is_real[None, :], jnp.exp(scores - raised[:, None]), 0.0)
        fade = jnp.exp(most - raised)
        read = plgpu.dot(shares.astype(values.dtype), values, precision=precision)
        if plan.moments:
            is_counted = is_real & (places > 0)
            x = jnp.where(is_counted[None, :], scores - mean_logits[:, None], 0.0)
            y = jnp.where(is_counted[:, None], values.astype(jnp.float32) - mean_values[None, :], 0.0)
            moments = jax.tree.map(jnp.add, moments, sum_tile(x, y, is_counted, values.dtype, precision))
        return raised, total * fade + jnp.sum(shares, axis=1), sums * fade[:, None] + read, moments

    start = jnp.full((plan.rows,), MASKED, jnp.float32), _zeros(plan.rows), _zeros(plan.rows, plan.width), moments
    most, total, sums, moments = lax.fori_loop(0, plan.tiles, read_tile, start)
    is_head = of_group < plan.group
    plgpu.store(sums_ref.at[of_group[:, None], lanes[None, :]], sums, mask=is_query)
    plgpu.store(most_ref.at[of_group], most, mask=is_head)
    plgpu.store(totals_ref.at[of_group], total, mask=is_head)
    if plan.moments:
        plgpu.store(moment_refs.count, moments.count)
        plgpu.store(moment_refs.logits.at[of_group], moments.logits, mask=is_head)
        plgpu.store(moment_refs.squares.at[of_group], moments.squares, mask=is_head)
        plgpu.store(moment_refs.values.at[lanes], moments.values, mask=is_dim)
        plgpu.store(moment_refs.products.at[of_group[:, None], lanes[None, :]], moments.products, mask=is_query)


def _join_kernel(sums_ref, most_ref, totals_ref, moment_refs, out_ref, *more_refs, plan):
    splits, lanes = jnp.arange(plan.lanes), jnp.arange(plan.width)
    is_split, is_dim = splits < plan.splits, lanes < plan.head_dim
    is_there = is_split[:, None] & is_dim[None, :]
    sums = plgpu.load(sums_ref.at[splits[:, None], lanes[None, :]], mask=is_there, other=0.0)
    most = plgpu.load(most_ref.at[splits], mask=is_split, other=MASKED)
    totals = plgpu.load(totals_ref.at[splits], mask=is_split, other=0.0)
    highest = jnp.max(most, axis=0)
    shares = jnp.exp(most - highest)
    read = jnp.sum(sums * shares[:, None], axis=0)
    total = jnp.sum(totals * shares, axis=0)
    plgpu.store(out_ref.at[lanes], (read / total).astype(out_ref.dtype), mask=is_dim)
    if plan.moments:
        log_sum_ref, highest_ref, joined_refs = more_refs
        plgpu.store(log_sum_ref, highest + jnp.log(total))
        plgpu.store(highest_ref, highest)
        for of_splits, joined in zip(moment_refs, joined_refs, strict=True):
            if joined.shape:
                found = plgpu.load(of_splits.at[splits[:, None], lanes[None, :]], mask=is_there, other=0.0)
                plgpu.store(joined.at[lanes], jnp.sum(found, axis=0), mask=is_dim)
            else:
                found = plgpu.load(of_splits.at[splits], mask=is_split, other=0.0)
                plgpu.store(joined, jnp.sum(found, axis=0))


def make_plan(queries: Array, keys: Array, indices: Array, moments: bool) -> Plan:
    """How a call is cut: as many programs as keep a GPU busy, each with whole tiles."""
    batch, q_heads, head_dim = queries.shape
    heads, budget = indices.shape[1:]
    cfg = config_here(CONFIGS)
    tiles = -(-budget // cfg.tile)
    tiles_of_split = -(-tiles // min(tiles, cfg.most_splits, -(-cfg.programs // (batch * heads))))
    width, splits = max(_power_of_two(head_dim), cfg.rows), -(-tiles // tiles_of_split)
    group = q_heads // heads
    return Plan(heads, keys.shape[2], group, head_dim, width, budget, tiles_of_split, splits, moments, cfg)


def sparse_attention_pallas_triton(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    interpret: bool = False,
) -> Float[Array, "batch q_heads head_dim"]:
    """`sparse_attention`; programs of a row are joined by their softmax sums."""
    plan = make_plan(queries, keys, indices, moments=False)
    partial = _read(queries, keys, values, indices, is_real, (), plan, interpret)
    return _join(*partial, queries.dtype, plan, interpret)[0].reshape(queries.shape)


def read_selected_pallas_triton(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    mean_logits: Float[Array, "batch q_heads"],
    mean_values: Float[Array, "batch kv_heads head_dim"],
    interpret: bool = False,
) -> Reads:
    """`read_selected`; x and y are rounded to the values' type before they are multiplied."""
    plan = make_plan(queries, keys, indices, moments=True)
    means = (mean_logits.reshape(-1, plan.group).astype(jnp.float32), mean_values.astype(jnp.float32))
    partial = _read(queries, keys, values, indices, is_real, means, plan, interpret)
    out, log_sum, highest, moments = _join(*partial, jnp.dtype(jnp.float32), plan, interpret)
    by_row = (out, log_sum, highest, *moments)
    return Reads(*(each.reshape(queries.shape[:2] + each.shape[2:]) for each in by_row))


def _read(
    queries: Array,
    keys: Array,
    values: Array,
    indices: Array,
    is_real: Array,
    means: tuple[Array, ...],
    plan: Plan,
    interpret: bool,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Return what each program found: sums of values, the highest logit, sums of shares; and moments, if the plan has.

    Args:
        means: of logits `[rows, group]` and of values `[batch, kv_heads, head_dim]`, if the plan has moments.
    """
    rows, group, head_dim = len(queries) * plan.heads, plan.group, plan.head_dim

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda row, split: (row,) + (0,) * len(shape))

    def of_split(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row, split: (row, split) + (0,) * len(shape))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda row, split: (0,) * array.ndim)

    def shape_of(*shape):
        return jax.ShapeDtypeStruct((rows, plan.splits, *shape), jnp.float32)

    def results(make):
        of_head = functools.partial(make, group)
        return of_head(head_dim), of_head(), of_head(), make_moments(make, of_head, head_dim) if plan.moments else ()

    return pl.pallas_call(
        functools.partial(_read_kernel, plan=plan),
        grid=(rows, plan.splits),
        in_specs=[
            of_row(group, head_dim), whole(keys), whole(values), of_row(plan.budget), of_row(plan.budget),
            (of_row(group), whole(means[1])) if plan.moments else (),
        ],
        out_specs=results(of_split),
        out_shape=results(shape_of),
        compiler_params=plgpu.CompilerParams(num_warps=plan.cfg.read_warps, num_stages=plan.cfg.read_stages),
        interpret=interpret,
        name="read_chosen",
    )(
        queries.reshape(rows, group, head_dim), keys, values,
        indices.reshape(rows, plan.budget), is_real.reshape(rows, plan.budget).astype(jnp.int8), means,
    )  # fmt: skip


def _join(
    sums: Array,
    most: Array,
    totals: Array,
    moments: tuple[Array, ...],
    out_dtype: jnp.dtype,
    plan: Plan,
    interpret: bool,
) -> tuple[Any, ...]:
    """Return attention by row and query head; and the logits' logsumexp and maximum and moments, if the plan has."""
    rows, splits, head_dim = len(sums), plan.splits, plan.head_dim

    def of_splits(*shape):
        return pl.BlockSpec((None, splits, *shape), lambda row, query: (row, 0) + (0,) * len(shape))

    def of_query(*shape):
        return pl.BlockSpec((None, splits, None, *shape), lambda row, query: (row, 0, query) + (0,) * len(shape))

    def joined(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row, query: (row, query) + (0,) * len(shape))

    def shape_of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, plan.group, *shape), dtype)

    def more(make):
        return (make(), make(), make_moments(make, make, head_dim)) if plan.moments else ()

    return pl.pallas_call(
        functools.partial(_join_kernel, plan=plan),
        grid=(rows, plan.group),
        in_specs=[
            of_query(head_dim), of_query(), of_query(),
            make_moments(of_splits, of_query, head_dim) if plan.moments else (),
        ],
        out_specs=(joined(head_dim), *more(joined)),
        out_shape=(shape_of(head_dim, dtype=out_dtype), *more(shape_of)),
        compiler_params=plgpu.CompilerParams(num_warps=plan.join_warps, num_stages=plan.cfg.join_stages),
        interpret=interpret,
        name="join_reads",
    )(sums, most, totals, moments)  # fmt: skip
