"""A step's hashing and appending in one kernel: a program weighs one KV head's queries of some sequences, or finds a
part of its new keys' codes, or copies queries, keys and values to where they go.

Products run on tensor cores. Those of keys take three TF32 parts, which is as exact as float32: codes of a decoding
step are those that prefill would have given. Those of queries take one: what it is off by is small against rounding to
whole weights, of which fewer than two in a hundred are rounded the other way.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int8, Int32, Shaped, UInt32

from spotlight_jax.bits import pack_bits
from spotlight_jax.config.hashing import WORD_BITS
from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.configs import config_here
from spotlight_jax.kernels.hash_append.config import CONFIGS, Config
from spotlight_jax.kernels.hash_append.reference import Transform
from spotlight_jax.kernels.triton import Index, Ref
from spotlight_jax.token_axis import first_slot
from spotlight_jax.weights import INT8_LIMIT, real_room


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes and settings of a call."""

    batch: int
    kv_heads: int
    group: int  # query heads of a KV head
    sums: int
    head_dim: int
    code_bits: int
    max_len: int
    is_split: bool  # whether a new token may be another device's
    interpret: bool
    cfg: Config

    @property
    def tile(self) -> int:
        """Sequences of a program."""
        return self.cfg.rows // self.sums

    @property
    def chunks(self) -> list[Int32[Array, "depth"]]:
        """Dimensions that are multiplied at once; the last ones may lie past head_dim."""
        return [first + jnp.arange(self.cfg.depth) for first in range(0, self.head_dim, self.cfg.depth)]

    @property
    def bits(self) -> int:
        """code_bits, up to a power of two."""
        return _power_of_two(self.code_bits)

    @property
    def bits_at_once(self) -> int:
        """Of a key's code, that one program finds: as a whole it would take longer than the weights of the queries."""
        return min(self.bits, self.cfg.code_bits)

    @property
    def code_parts(self) -> int:
        """Programs of a key's code."""
        return self.bits // self.bits_at_once

    def multiply(self, x: list[Array], matrix: list["_Asked"], is_exact: bool) -> Array:
        """Multiply chunks: as exact as float32, or by TF32."""
        exact = lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if is_exact else lax.Precision.DEFAULT
        return sum(plgpu.dot(left, right.get(), precision=precision) for left, right in zip(x, matrix, strict=True))


def _power_of_two(number: int) -> int:
    """Return the least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A block that was asked for, and where it is part of the array.

    A product's operands go through shared memory. Triton moves there at once what is loaded and multiplied as it is,
    and waits for it before it asks for the next. What `get` gives is not as it was loaded, so that all that was asked
    for before is on its way together.
    """

    values: Array
    is_there: Array

    def get(self) -> Array:
        """Return the block in float32, zeros outside of the array."""
        return jnp.where(self.is_there, self.values.astype(jnp.float32), 0.0)


def _ask(ref: Ref, places: tuple[Index, ...], is_there: Array) -> _Asked:
    return _Asked(plgpu.load(ref.at[places], mask=is_there), is_there)


def _ask_matrix(ref: Ref, head: Index, bits: Array, plan: Plan) -> list[_Asked]:
    """Ask for the columns of one head's [head_dim, code_bits], in chunks."""
    bits = bits[None, :]
    chunks = [dims[:, None] for dims in plan.chunks]
    return [_ask(ref, (head, dims, bits), (dims < plan.head_dim) & (bits < plan.code_bits)) for dims in chunks]


def _ask_rows(ref: Ref, sequences: Array, head: Index, plan: Plan) -> list[_Asked]:
    """Ask for one head's vectors, a row a sequence, in chunks."""
    sequences, chunks = sequences[:, None], [dims[None, :] for dims in plan.chunks]
    return [_ask(ref, (sequences, head, dims), (sequences < plan.batch) & (dims < plan.head_dim)) for dims in chunks]


def _weigh_queries(
    heads_ref: Ref, bit_weights_ref: Ref, assignment_ref: Ref, log_scale_ref: Ref, weights_ref: Ref,
    first: Index, head: Index, plan: Plan,
) -> None:  # fmt: skip
    """Write integer weights of each score head; one scale serves all of a sequence."""
    rows = jnp.arange(plan.cfg.rows)
    sequences, sums = first + rows // plan.sums, rows % plan.sums
    bit_weights = _ask_matrix(bit_weights_ref, head, jnp.arange(plan.bits), plan)
    places = range(plan.group)
    queries = [_ask_rows(heads_ref, sequences, head * plan.group + place, plan) for place in places]
    is_part_of = [plgpu.load(assignment_ref.at[head, sums, place]) for place in places]
    scales = [jnp.exp(log_scale_ref[head * plan.group + place]) for place in places]
    shares = [(is_part * scale)[:, None] for is_part, scale in zip(is_part_of, scales, strict=True)]

    def mix(chunk: int) -> Array:
        parts = [share * asked[chunk].get() for share, asked in zip(shares, queries, strict=True)]
        return functools.reduce(operator.add, parts)

    weights = plan.multiply([mix(chunk) for chunk in range(len(plan.chunks))], bit_weights, is_exact=False)
    squares, sizes = jnp.sum(jnp.square(weights), axis=1), jnp.abs(weights)
    largest, total = jnp.max(sizes, axis=1), jnp.sum(sizes, axis=1)
    norm = lax.rsqrt(squares + 1e-12)
    room = real_room(plan.code_bits)
    scale = jnp.minimum(INT8_LIMIT / jnp.maximum(largest * norm, 1e-30), room / jnp.maximum(total * norm, 1e-30))
    scale = jnp.min(scale.reshape(plan.tile, plan.sums), axis=1)[:, None]
    scale = norm * jnp.broadcast_to(scale, (plan.tile, plan.sums)).reshape(plan.cfg.rows)
    whole = jnp.floor(weights * scale[:, None] + 0.5).astype(jnp.int8)
    bits = jnp.arange(plan.bits)[None, :]
    is_there = (sequences < plan.batch)[:, None] & (bits < plan.code_bits)
    plgpu.store(weights_ref.at[sequences[:, None], head, sums[:, None], bits], whole, mask=is_there)


def _places_of(lengths_ref: Ref, first: Index, plan: Plan) -> tuple[Array, Array, Array]:
    """Return a program's sequences; where their new token goes, and whether it goes to this device, as columns."""
    rows = jnp.arange(plan.cfg.rows)
    sequences = jnp.where(rows < plan.tile, first + rows, plan.batch)  # rows past the tile are no sequence's
    is_own = sequences < plan.batch
    at = plgpu.load(lengths_ref.at[sequences], mask=is_own, other=0)
    if plan.is_split:
        is_own &= (at >= 0) & (at < plan.max_len)
    return sequences, jnp.minimum(at, plan.max_len - 1)[:, None], is_own[:, None]


def _append_codes(
    heads_ref: Ref, mean_ref: Ref, axes_ref: Ref, levels_ref: Ref, lengths_ref: Ref, cached_codes_ref: Ref,
    part: Index, first: Index, head: Index, plan: Plan,
) -> None:  # fmt: skip
    """Write a part of the code of each sequence's new key."""
    sequences, at, is_own = _places_of(lengths_ref, first, plan)
    bits = part * plan.bits_at_once + jnp.arange(plan.bits_at_once)
    words = part * (plan.bits_at_once // WORD_BITS) + jnp.arange(plan.bits_at_once // WORD_BITS)
    axes = _ask_matrix(axes_ref, head, bits, plan)
    keys = _ask_rows(heads_ref, sequences, plan.kv_heads * plan.group + head, plan)
    chunks = [dims[None, :] for dims in plan.chunks]
    means = [_ask(mean_ref, (head, dims), dims < plan.head_dim) for dims in chunks]
    levels = plgpu.load(levels_ref.at[head, bits], mask=bits < plan.code_bits, other=2.0)[None, :]
    centred = [key.get() - mean.get() for key, mean in zip(keys, means, strict=True)]
    coordinates = plan.multiply(centred, axes, is_exact=True) + 0.5
    level = jnp.ceil(levels * jnp.clip(coordinates, 0.5 / levels, 1 - 0.5 / levels)).astype(jnp.int32) - 1
    codes = pack_bits(level & 1)
    is_word = is_own & (words < plan.code_bits // WORD_BITS)[None, :]
    plgpu.store(cached_codes_ref.at[sequences[:, None], head, words[None, :], at], codes, mask=is_word)


def _copy_heads(
    heads_ref: Ref, lengths_ref: Ref, queries_ref: Ref, cached_keys_ref: Ref, cached_values_ref: Ref,
    first: Index, head: Index, plan: Plan,
) -> None:  # fmt: skip
    """Copy a KV head's queries, and its keys and values to the caches, as they are."""
    sequences, at, is_own = _places_of(lengths_ref, first, plan)
    queries = [head * plan.group + place for place in range(plan.group)]
    key = plan.kv_heads * plan.group + head
    moves: list[tuple[Ref, Index, tuple[Index, ...]]] = [(queries_ref, query, (query,)) for query in queries]
    moves += [(cached_keys_ref, key, (at, head)), (cached_values_ref, key + plan.kv_heads, (at, head))]
    asked = [_ask_rows(heads_ref, sequences, source, plan) for _, source, _ in moves]
    for (ref, _, place), rows in zip(moves, asked, strict=True):
        for dims, chunk in zip(plan.chunks, rows, strict=True):
            there = ref.at[(sequences[:, None], *place, dims[None, :])]
            is_there = chunk.is_there if ref is queries_ref else chunk.is_there & is_own
            plgpu.store(there, chunk.values.astype(ref.dtype), mask=is_there)


def _kernel(
    heads_ref: Ref, mean_ref: Ref, axes_ref: Ref, levels_ref: Ref, bit_weights_ref: Ref, assignment_ref: Ref,
    log_scale_ref: Ref, lengths_ref: Ref, _keys: Ref, _values: Ref, _codes: Ref, queries_ref: Ref, weights_ref: Ref,
    cached_keys_ref: Ref, cached_values_ref: Ref, cached_codes_ref: Ref,
    *, plan: Plan,
) -> None:  # fmt: skip
    kind, head = pl.program_id(0) // plan.kv_heads, pl.program_id(0) % plan.kv_heads
    place = pl.program_id(1) * plan.tile, head, plan

    @pl.when(kind < plan.code_parts)
    def append() -> None:
        _append_codes(heads_ref, mean_ref, axes_ref, levels_ref, lengths_ref, cached_codes_ref, kind, *place)

    @pl.when(kind == plan.code_parts)
    def weigh() -> None:
        _weigh_queries(heads_ref, bit_weights_ref, assignment_ref, log_scale_ref, weights_ref, *place)

    @pl.when(kind > plan.code_parts)
    def copy() -> None:
        _copy_heads(heads_ref, lengths_ref, queries_ref, cached_keys_ref, cached_values_ref, *place)


def hash_append_pallas_triton(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    transform: Transform,
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
    axis: str | None = None,
    interpret: bool = False,
) -> tuple[
    Shaped[Array, "batch q_heads head_dim"],
    Int8[Array, "batch kv_heads score_heads code_bits"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """Run `hash_append`; half a weight is rounded up, where the reference rounds it to even.

    Queries, keys and values are one operand, which XLA makes in one launch.
    """
    batch, kv_heads, head_dim = keys.shape
    code_bits, sums = transform.axes.shape[2], transform.head_assignment.shape[1]
    group, max_len = queries.shape[1] // kv_heads, cached_keys.shape[1]
    cfg = config_here(CONFIGS)
    plan = Plan(batch, kv_heads, group, sums, head_dim, code_bits, max_len, axis is not None, interpret, cfg)
    caches = cached_keys, cached_values, cached_codes
    queries, weights, *caches = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=((plan.code_parts + 2) * kv_heads, -(-batch // plan.tile)),
        out_shape=(
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, sums, code_bits), jnp.int8),
            *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
        ),
        input_output_aliases={8: 2, 9: 3, 10: 4},  # the caches stay where they are
        compiler_params=plgpu.CompilerParams(
            num_warps=cfg.warps if code_bits <= 128 else cfg.wide_warps, num_stages=cfg.stages
        ),
        interpret=interpret,
        name="hash_append",
    )(jnp.concatenate([queries, keys, values], axis=1), *transform, lengths - first_slot(max_len, axis), *caches)
    return queries, weights, *caches
