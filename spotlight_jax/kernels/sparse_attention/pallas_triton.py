"""Sparse attention in two kernels: every program gathers and reads some of a row's tokens, then rows are put together.

A row is one selection: of a KV head, whose query heads then share its keys and values, or of a query head.
`estimated_attention` is the same two kernels: programs of the first also sum the logits for `tail.take_off`, a few more
of them multiply the moments with the queries, and the second makes the estimate of all that.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.sparse_attention.config import CONFIGS, Config
from spotlight_jax.kernels.triton import Index, Ref
from spotlight_jax.moments import BLOCK, Moments, block_start
from spotlight_jax.tail import Corrections, LogitMoments, TailParams, ValueMoments, estimate, join, take_off
from spotlight_jax.token_axis import first_slot

MASKED = -1e30
Made = TypeVar("Made")  # a result's block, or its shape
Found = tuple[Array, Array, Array, list[Array], tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes and settings of a call."""

    heads: int
    kv_heads: int
    group: int  # query heads of a selection
    head_dim: int
    budget: int
    has_tail: bool  # whether the newest tokens are read, too, and the others estimated
    tiles: int  # of one program
    splits: int
    cfg: Config

    @property
    def width(self) -> int:
        """Width of a vector over head_dim: a power of two."""
        return max(_power_of_two(self.head_dim), self.cfg.rows)

    @property
    def listed(self) -> int:
        """Slots of a selection, up to whole tiles; the newest tokens follow."""
        return -(-self.budget // self.cfg.tile) * self.cfg.tile

    @property
    def products(self) -> int:
        """Programs of a row that multiply moments with queries."""
        return -(-2 * self.head_dim // self.cfg.product_rows) if self.has_tail else 0

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
    """Return the least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def _zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.float32)


def _read_kernel(
    queries_ref: Ref, keys_ref: Ref, values_ref: Ref, indices_ref: Ref, is_real_ref: Ref, tail_refs: Sequence[Ref],
    out_ref: Ref, m_ref: Ref, totals_ref: Ref, sum_refs: Sequence[Ref], products_refs: Sequence[Ref], *, plan: Plan,
) -> None:  # fmt: skip
    row, split = pl.program_id(0), pl.program_id(1)
    sequence, head = row // plan.heads, row % plan.heads
    kv_head = head // (plan.heads // plan.kv_heads)
    of_group, lanes = jnp.arange(plan.rows), jnp.arange(plan.width)
    is_dim, is_head = lanes < plan.head_dim, of_group < plan.group
    is_query = is_head[:, None] & is_dim[None, :]
    queries = plgpu.load(queries_ref.at[of_group[:, None], lanes[None, :]], mask=is_query, other=0.0)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def read() -> None:
        if plan.has_tail:
            origin, start, end = (plgpu.load(tail_refs[0].at[sequence, jnp.int32(place)]) for place in range(3))

        def read_tile(tile: Index, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            m, total, out, *sums = carry
            slots = (split * plan.tiles + tile) * plan.cfg.tile + jnp.arange(plan.cfg.tile)
            is_slot = slots < plan.budget
            is_real = plgpu.load(is_real_ref.at[slots], mask=is_slot, other=0) != 0
            positions = plgpu.load(indices_ref.at[slots], mask=is_slot, other=0)
            if plan.has_tail:
                newest = start + slots - plan.listed
                is_listed = slots < plan.listed
                is_newest = (newest >= 0) & (newest < end) & (newest < start + BLOCK)
                is_real = jnp.where(is_listed, is_real & (positions < start), is_newest)
                positions = jnp.where(is_real, jnp.where(is_listed, positions, newest), 0)
            at = (sequence, positions[:, None], kv_head, lanes[None, :])
            is_there = is_real[:, None] & is_dim[None, :]
            keys = plgpu.load(keys_ref.at[at], mask=is_there, other=0.0)
            values = plgpu.load(values_ref.at[at], mask=is_there, other=0.0)  # asked for before the keys are there
            scores = plgpu.dot(queries, keys, trans_b=True, precision=precision) * plan.head_dim**-0.5
            scores = jnp.where(is_real[None, :], scores, MASKED)
            raised = jnp.maximum(m, jnp.max(scores, axis=1))
            p = jnp.where(is_real[None, :], jnp.exp(scores - raised[:, None]), 0.0)
            alpha = jnp.exp(m - raised)
            acc = plgpu.dot(p.astype(values.dtype), values, precision=precision)
            if plan.has_tail:
                is_counted = is_real & (positions > origin) & (positions < start)
                x = jnp.where(is_counted[None, :], scores, 0.0)
                counted = jnp.where(is_counted, 1.0, 0.0)
                sums = [old + new for old, new in zip(sums, (counted, x, x * x), strict=True)]
            return raised, total * alpha + jnp.sum(p, axis=1), out * alpha[:, None] + acc, *sums

        # by place in a tile: added up once, at the end
        sums = [_zeros(plan.cfg.tile), *[_zeros(plan.rows, plan.cfg.tile)] * 2] if plan.has_tail else []
        first = jnp.full((plan.rows,), MASKED, jnp.float32), _zeros(plan.rows), _zeros(plan.rows, plan.width), *sums
        m, total, out, *sums = lax.fori_loop(0, plan.tiles, read_tile, first)
        plgpu.store(out_ref.at[of_group[:, None], lanes[None, :]], out, mask=is_query)
        plgpu.store(m_ref.at[of_group], m, mask=is_head)
        plgpu.store(totals_ref.at[of_group], total, mask=is_head)
        if plan.has_tail:
            count_ref, logits_ref, squares_ref = sum_refs
            plgpu.store(count_ref, jnp.sum(sums[0], axis=0))
            plgpu.store(logits_ref.at[of_group], jnp.sum(sums[1], axis=1), mask=is_head)
            plgpu.store(squares_ref.at[of_group], jnp.sum(sums[2], axis=1), mask=is_head)

    def multiply() -> None:
        numbers = (split - plan.splits) * plan.cfg.product_rows + jnp.arange(plan.cfg.product_rows)
        is_row = numbers < 2 * plan.head_dim
        at = (sequence, kv_head, numbers[:, None], lanes[None, :])
        covariance = plgpu.load(tail_refs[1].at[at], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        products = plgpu.dot(queries, covariance, trans_b=True, precision=precision)
        is_product = is_head[:, None] & is_row[None, :]
        plgpu.store(products_refs[0].at[of_group[:, None], numbers[None, :]], products, mask=is_product)

    if plan.has_tail:
        pl.when(split < plan.splits)(read)
        pl.when(split >= plan.splits)(multiply)
    else:
        read()


def _join_kernel(
    parts_ref: Ref, m_ref: Ref, totals_ref: Ref, sum_refs: Sequence[Ref], tail_refs: Sequence[Any],
    out_ref: Ref, *share_ref: Ref, plan: Plan,
) -> None:  # fmt: skip
    splits, lanes = jnp.arange(plan.lanes), jnp.arange(plan.width)
    is_split, is_dim = splits < plan.splits, lanes < plan.head_dim

    def load(ref: Ref) -> Array:
        """Load the numbers or vectors of all splits."""
        if len(ref.shape) == 1:
            return plgpu.load(ref.at[splits], mask=is_split, other=0.0)
        is_there = is_split[:, None] & is_dim[None, :]
        return plgpu.load(ref.at[splits[:, None], lanes[None, :]], mask=is_there, other=0.0)

    # everything is asked for before anything is computed
    m, totals, parts = load(m_ref), load(totals_ref), load(parts_ref)
    sums = [load(ref) for ref in sum_refs]
    tail = _load_tail(*tail_refs, plan=plan) if plan.has_tail else None
    m = jnp.where(is_split, m, MASKED)
    highest = jnp.max(m, axis=0)
    alpha = jnp.exp(m - highest)
    total = jnp.sum(totals * alpha, axis=0)
    out = jnp.sum(parts * alpha[:, None], axis=0) / total
    if tail is not None:
        whole, values, corrections = tail
        count, logits, squares = (jnp.sum(by_split, axis=0) for by_split in sums)
        # sums of logits, to those of their differences from the mean
        off = logits - count * whole.mean
        squares = squares - whole.mean * (logits + off)
        unread = take_off(whole, count, off, jnp.maximum(squares, 0.0))
        log_mass, value = estimate(whole, unread, values, highest, corrections)
        out, share = join(out, highest + jnp.log(total), value, log_mass)
        plgpu.store(share_ref[0], share)
    plgpu.store(out_ref.at[lanes], out.astype(out_ref.dtype), mask=is_dim)


def _load_tail(
    queries_ref: Ref, products_ref: Ref, count_ref: Ref, mean_ref: Ref, params_refs: Sequence[Ref], *, plan: Plan
) -> tuple[LogitMoments, ValueMoments, Corrections]:
    """Load the moments of all tokens for one query head, and its corrections."""
    row, query = pl.program_id(0), pl.program_id(1)
    sequence, head = row // plan.heads, row % plan.heads
    kv_head, q_head = head // (plan.heads // plan.kv_heads), head * plan.group + query
    lanes = jnp.arange(plan.width)
    is_dim = lanes < plan.head_dim

    def load(ref: Ref, *at: Index) -> Array:
        return plgpu.load(ref.at[(*at, lanes)], mask=is_dim, other=0.0).astype(jnp.float32)

    def load_second(ref: Ref, *at: Index) -> Array:
        return plgpu.load(ref.at[(*at, plan.head_dim + lanes)], mask=is_dim, other=0.0)

    def correction(ref: Ref, *column: int) -> Array:
        own = sequence if ref.shape[0] > 1 else jnp.zeros_like(sequence)
        return plgpu.load(ref.at[(own, q_head, *(jnp.full_like(own, one) for one in column))])

    scale = plan.head_dim**-0.5
    scaled = load(queries_ref) * scale
    count = plgpu.load(count_ref.at[sequence])
    whole = LogitMoments(
        count=count,
        mean=jnp.sum(load(mean_ref, sequence, kv_head) * scaled, axis=0),
        variance=jnp.sum(load(products_ref) * scaled, axis=0) * scale,
    )
    values = ValueMoments(load_second(mean_ref, sequence, kv_head), load_second(products_ref) * scale)
    cut_ref, log_mass_ref, spread_ref, slope_ref, gate_ref = params_refs  # the leaves of `TailParams`
    corrections = Corrections(
        correction(cut_ref, 0), correction(cut_ref, 1), correction(log_mass_ref, 0), correction(log_mass_ref, 1),
        correction(spread_ref), correction(slope_ref, 0), correction(slope_ref, 1), correction(gate_ref),
    )  # fmt: skip
    return whole, values, corrections


def make_plan(queries: Array, keys: Array, indices: Array, has_tail: bool) -> Plan:
    """Return how a call is cut: as many programs as keep a GPU busy, each with whole tiles."""
    batch, q_heads, head_dim = queries.shape
    heads, budget = indices.shape[1:]
    cfg = config_here(CONFIGS)
    tiles = -(-budget // cfg.tile) + (-(-BLOCK // cfg.tile) if has_tail else 0)
    tiles_of_split = -(-tiles // min(tiles, cfg.most_splits, -(-cfg.programs // (batch * heads))))
    splits = -(-tiles // tiles_of_split)
    return Plan(heads, keys.shape[2], q_heads // heads, head_dim, budget, has_tail, tiles_of_split, splits, cfg)


def sparse_attention_pallas_triton(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    axis: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch q_heads head_dim"]:
    """Compute `sparse_attention`; programs of a row are joined by their softmax sums."""
    plan = make_plan(queries, keys, indices, has_tail=False)
    found = _read(queries, keys, values, indices, is_real, (), plan, interpret)
    plan, (parts, m, totals, *_) = _exchange(found, plan, axis)
    return _join(parts, m, totals, [], (), queries.dtype, plan, interpret)[0].reshape(queries.shape)


def estimated_attention_pallas_triton(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    ends: Int32[Array, "batch"],
    moments: Moments,
    params: TailParams,
    axis: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Compute `estimated_attention`; a row's programs that multiply moments with queries follow those that read."""
    plan = make_plan(queries, keys, indices, has_tail=True)
    places = jnp.stack([jnp.zeros_like(ends), block_start(ends - 1), ends], axis=1)
    places = (places - first_slot(keys.shape[1], axis)).at[:, 2].min(keys.shape[1])  # first token, newest block, end
    tail = (places, moments.covariance)
    found = _read(queries, keys, values, indices, is_real, tail, plan, interpret)
    plan, (parts, m, totals, sums, products) = _exchange(found, plan, axis)
    grouped = queries.reshape(-1, plan.group, plan.head_dim)
    known = (grouped, *products, moments.count, moments.mean, tuple(jax.tree.leaves(params)))
    out, share = _join(parts, m, totals, sums, known, queries.dtype, plan, interpret)
    return out.reshape(queries.shape), share.reshape(queries.shape[:2])


def _whole(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda row, program: (0,) * array.ndim)


def _read(
    queries: Array,
    keys: Array,
    values: Array,
    indices: Array,
    is_real: Array,
    tail: tuple[Array, ...],
    plan: Plan,
    interpret: bool,
) -> Found:
    """Return what each split found: sums of values, maximum, sum of exponentials; sums and products for the tail.

    Args:
        tail: places of each sequence's first token, newest block and end, and covariance of the moments, if the plan
            has a tail.
    """
    rows, group, head_dim = len(queries) * plan.heads, plan.group, plan.head_dim

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda row, program: (row,) + (0,) * len(shape))

    def of_split(*shape: int) -> pl.BlockSpec:
        def place(row: Index, program: Index) -> tuple[Index, ...]:
            return (row, jnp.minimum(program, plan.splits - 1)) + (0,) * len(shape)

        return pl.BlockSpec((None, None, *shape), place)

    def shape_of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, plan.splits, *shape), jnp.float32)

    def results(make: Callable[..., Made], products: Made) -> tuple[Made, Made, Made, list[Made], tuple[Made, ...]]:
        of_head = functools.partial(make, group)
        sums = [make(), of_head(), of_head()] if plan.has_tail else []  # of what was read: count, logits, squares
        return of_head(head_dim), of_head(), of_head(), sums, (products,) if plan.has_tail else ()

    return pl.pallas_call(
        functools.partial(_read_kernel, plan=plan),
        grid=(rows, plan.splits + plan.products),
        in_specs=[
            of_row(group, head_dim), _whole(keys), _whole(values), of_row(plan.budget), of_row(plan.budget),
            tuple(map(_whole, tail)),
        ],
        out_specs=results(of_split, of_row(group, 2 * head_dim)),
        out_shape=results(shape_of, jax.ShapeDtypeStruct((rows, group, 2 * head_dim), jnp.float32)),
        compiler_params=plgpu.CompilerParams(num_warps=plan.cfg.read_warps, num_stages=plan.cfg.read_stages),
        interpret=interpret,
        name="read_chosen",
    )(
        queries.reshape(rows, group, head_dim), keys, values,
        indices.reshape(rows, plan.budget), is_real.reshape(rows, plan.budget).astype(jnp.int8), tail,
    )  # fmt: skip


def _exchange(found: Found, plan: Plan, axis: str | None) -> tuple[Plan, Found]:
    """Return what each device found as a split, and the plan of joining those; without an axis, what there is.

    What is exchanged is as long as a device's queries, a few numbers more each.
    """
    if axis is None:
        return plan, found
    parts, m, totals, sums, products = found
    highest = m.max(axis=1, keepdims=True)
    share = jnp.exp(m - highest)[..., None]
    of_tail = [rows.reshape(*rows.shape[:2], -1, 1) for rows in sums]  # a count is of all query heads
    numbers = [jnp.broadcast_to(rows, share.shape) for rows in (totals[..., None] * share, *of_tail)]
    own = jnp.concatenate([parts * share, *numbers], axis=-1).sum(axis=1, keepdims=True)
    of_all = lax.all_gather(jnp.concatenate([own, highest[..., None]], axis=-1), axis, axis=1, tiled=True)
    totals, *sums, m = jnp.moveaxis(of_all[..., plan.head_dim :], -1, 0)
    sums[:1] = [rows[..., 0] for rows in sums[:1]]
    found = of_all[..., : plan.head_dim], m, totals, sums, products
    return dataclasses.replace(plan, splits=of_all.shape[1]), found


def _join(
    parts: Array,
    m: Array,
    totals: Array,
    sums: list[Array],
    tail: tuple[Any, ...],
    out_dtype: jnp.dtype,
    plan: Plan,
    interpret: bool,
) -> tuple[Array, ...]:
    """Return attention by row and query head; and the share that was estimated, if the plan has a tail."""
    rows, splits, head_dim = len(parts), plan.splits, plan.head_dim

    def of_query(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, splits, None, *shape), lambda row, query: (row, 0, query) + (0,) * len(shape))

    def joined(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda row, query: (row, query) + (0,) * len(shape))

    def shape_of(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, plan.group, *shape), dtype)

    of_splits = pl.BlockSpec((None, splits), lambda row, query: (row, 0))
    sum_specs, tail_specs, shares = [], (), []
    if plan.has_tail:
        sum_specs = [of_splits, of_query(), of_query()]
        tail_specs = (joined(head_dim), joined(2 * head_dim), *jax.tree.map(_whole, tail[2:]))
        shares = [joined()]
    return pl.pallas_call(
        functools.partial(_join_kernel, plan=plan),
        grid=(rows, plan.group),
        in_specs=[of_query(head_dim), of_query(), of_query(), sum_specs, tail_specs],
        out_specs=[joined(head_dim), *shares],
        out_shape=[shape_of(out_dtype, head_dim), *([shape_of(jnp.dtype(jnp.float32))] if shares else [])],
        compiler_params=plgpu.CompilerParams(num_warps=plan.join_warps, num_stages=plan.cfg.join_stages),
        interpret=interpret,
        name="join_reads",
    )(parts, m, totals, sums, tail)  # fmt: skip
