"""Sparse attention in two kernels: every program gathers and reads some of a row's tokens, then rows are put together.

A row is one selection: of a KV head, whose query heads then share its keys and values, or of a query head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.sparse_attention.config import CONFIGS, Config

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


def _read_kernel(queries_ref, keys_ref, values_ref, indices_ref, is_real_ref, sums_ref, most_ref, totals_ref, *, plan):
    row, split = pl.program_id(0), pl.program_id(1)
    sequence, head = row // plan.heads, row % plan.heads
    kv_head = head // (plan.heads // plan.kv_heads)
    of_group, lanes = jnp.arange(plan.rows), jnp.arange(plan.width)
    is_dim = lanes < plan.head_dim
    is_query = (of_group < plan.group)[:, None] & is_dim[None, :]
    queries = plgpu.load(queries_ref.at[of_group[:, None], lanes[None, :]], mask=is_query, other=0.0)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def read_tile(tile, carry):
        most, total, sums = carry
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
        return raised, total * fade + jnp.sum(shares, axis=1), sums * fade[:, None] + read

    start = (
        jnp.full((plan.rows,), MASKED, jnp.float32),
        jnp.zeros((plan.rows,), jnp.float32),
        jnp.zeros((plan.rows, plan.width), jnp.float32),
    )
    most, total, sums = lax.fori_loop(0, plan.tiles, read_tile, start)
    is_head = of_group < plan.group
    plgpu.store(sums_ref.at[of_group[:, None], lanes[None, :]], sums, mask=is_query)
    plgpu.store(most_ref.at[of_group], most, mask=is_head)
    plgpu.store(totals_ref.at[of_group], total, mask=is_head)


def _join_kernel(sums_ref, most_ref, totals_ref, out_ref, *, plan):
    splits, lanes = jnp.arange(plan.lanes), jnp.arange(plan.width)
    is_split, is_dim = splits < plan.splits, lanes < plan.head_dim
    is_there = is_split[:, None] & is_dim[None, :]
    sums = plgpu.load(sums_ref.at[splits[:, None], lanes[None, :]], mask=is_there, other=0.0)
    most = plgpu.load(most_ref.at[splits], mask=is_split, other=MASKED)
    totals = plgpu.load(totals_ref.at[splits], mask=is_split, other=0.0)
    shares = jnp.exp(most - jnp.max(most, axis=0))
    out = jnp.sum(sums * shares[:, None], axis=0) / jnp.sum(totals * shares, axis=0)
    plgpu.store(out_ref.at[lanes], out.astype(out_ref.dtype), mask=is_dim)


def make_plan(batch: int, q_heads: int, kv_heads: int, heads: int, head_dim: int, budget: int) -> Plan:
    """How a call is cut: as many programs as keep a GPU busy, each with whole tiles."""
    cfg = config_here(CONFIGS)
    tiles = -(-budget // cfg.tile)
    tiles_of_split = -(-tiles // min(tiles, cfg.most_splits, -(-cfg.programs // (batch * heads))))
    width, splits = max(_power_of_two(head_dim), cfg.rows), -(-tiles // tiles_of_split)
    return Plan(heads, kv_heads, q_heads // heads, head_dim, width, budget, tiles_of_split, splits, cfg)


def sparse_attention_pallas_triton(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    interpret: bool = False,
) -> Float[Array, "batch q_heads head_dim"]:
    """`sparse_attention`; programs of a row are joined by their softmax sums."""
    batch, q_heads, head_dim = queries.shape
    heads, budget = indices.shape[1:]
    plan = make_plan(batch, q_heads, keys.shape[2], heads, head_dim, budget)
    rows = batch * heads

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda row, split: (row,) + (0,) * len(shape))

    def of_split(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row, split: (row, split) + (0,) * len(shape))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda row, split: (0,) * array.ndim)

    def shape_of(*shape):
        return jax.ShapeDtypeStruct((rows, plan.splits, *shape), jnp.float32)

    sums, most, totals = pl.pallas_call(
        functools.partial(_read_kernel, plan=plan),
        grid=(rows, plan.splits),
        in_specs=[of_row(plan.group, head_dim), whole(keys), whole(values), of_row(budget), of_row(budget)],
        out_specs=[of_split(plan.group, head_dim), of_split(plan.group), of_split(plan.group)],
        out_shape=[shape_of(plan.group, head_dim), shape_of(plan.group), shape_of(plan.group)],
        compiler_params=plgpu.CompilerParams(num_warps=plan.cfg.read_warps, num_stages=plan.cfg.read_stages),
        interpret=interpret,
        name="read_chosen",
    )(
        queries.reshape(rows, plan.group, head_dim), keys, values,
        indices.reshape(rows, budget), is_real.reshape(rows, budget).astype(jnp.int8),
    )  # fmt: skip
    splits = plan.splits

    def of_query(*shape):
        return pl.BlockSpec((None, splits, None, *shape), lambda row, query: (row, 0, query) + (0,) * len(shape))

    out = pl.pallas_call(
        functools.partial(_join_kernel, plan=plan),
        grid=(rows, plan.group),
        in_specs=[of_query(head_dim), of_query(), of_query()],
        out_specs=pl.BlockSpec((None, None, head_dim), lambda row, query: (row, query, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, plan.group, head_dim), queries.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=plan.join_warps, num_stages=plan.cfg.join_stages),
        interpret=interpret,
        name="join_reads",
    )(sums, most, totals)
    return out.reshape(batch, q_heads, head_dim)
