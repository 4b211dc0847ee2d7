"""A step's hashing and appending in two kernels.

    networks  a program owns one head's share of hidden units and of the rotation's rows: a part of the head's output
    finish    a program adds up the parts of one row: a query's integer weights, or a key's code, written with the key

All programs of `networks` are alike, query heads' and key heads', and each asks for all of its weights at once.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from spotlight_jax.kernels.hash_append.reference import Networks
from spotlight_jax.kernels.score_select.packing import BYTE, WORD_BITS

SHARE = 32  # hidden units of a program, and dimensions that it rotates
TILE = 16  # sequences of a program: what a product on tensor cores has at least
WARPS = 8
BYTES = WORD_BITS // BYTE  # weights of a packed number


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    code_bits: int
    max_len: int
    limit: int
    per_kv_head: bool

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def members(self) -> int:
        """Query heads that select together."""
        return self.group if self.per_kv_head else 1

    @property
    def parts(self) -> int:
        """Of a head's network."""
        return -(-max(self.hidden, self.head_dim) // SHARE)

    @property
    def tile(self) -> int:
        """Sequences of a program: weights are read once for so many."""
        return TILE if self.batch <= TILE else 2 * TILE

    @property
    def dims(self) -> int:
        """head_dim, up to a power of two."""
        return _power_of_two(self.head_dim)

    @property
    def bits(self) -> int:
        """code_bits, up to a power of two."""
        return _power_of_two(self.code_bits)


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()


def _load_row(ref, head, columns, count: int, other: float = 0.0) -> Float[Array, "1 columns"]:
    """Some of one head's vector, as a row; `other` outside of it."""
    return plgpu.load(ref.at[head, columns], mask=columns < count, other=other)[None, :]


def _load_block(ref, head, rows, columns, row_count: int, column_count: int) -> Float[Array, "rows columns"]:
    """Some of one head's matrix; zeros outside of it."""
    is_there = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return plgpu.load(ref.at[head, rows[:, None], columns[None, :]], mask=is_there, other=0.0)


def _apply_part(refs: Networks, head, part, prepare: Callable[[], Callable], plan: Plan) -> Float[Array, "tile bits"]:
    """What a part adds to its head's output.

    Args:
        prepare: gives the function from dimensions to inputs; called when all weights are on their way.
    """
    own, bits = part * SHARE + jnp.arange(SHARE), jnp.arange(plan.bits)
    shares = [start + jnp.arange(SHARE) for start in range(0, plan.head_dim, SHARE)]
    kernels = [_load_block(refs.hidden_kernel, head, dims, own, plan.head_dim, plan.hidden) for dims in shares]
    out_kernel = _load_block(refs.out_kernel, head, own, bits, plan.hidden, plan.code_bits)
    rotation = _load_block(refs.rotation, head, own, bits, plan.head_dim, plan.code_bits)
    hidden_bias = _load_row(refs.hidden_bias, head, own, plan.hidden)
    out_bias = jnp.where(part == 0, _load_row(refs.out_bias, head, bits, plan.code_bits), 0.0)
    inputs = prepare()
    rotated = plgpu.dot(inputs(own), rotation) + out_bias
    hidden = sum(plgpu.dot(inputs(dims), kernel) for dims, kernel in zip(shares, kernels, strict=True))
    hidden = hidden + hidden_bias
    return rotated + plgpu.dot(hidden / (1.0 + jnp.exp(-hidden)), out_kernel)


def _networks_kernel(
    queries_ref, keys_ref, of_queries: Networks, of_keys: Networks, mean_ref, scale_ref, log_gain_ref, sums_ref, *,
    plan: Plan,
) -> None:  # fmt: skip
    part, head = pl.program_id(0), pl.program_id(1)
    rows = pl.program_id(2) * plan.tile + jnp.arange(plan.tile)

    def load_rows(ref, head, dims):
        is_there = (rows < plan.batch)[:, None] & (dims < plan.head_dim)[None, :]
        return plgpu.load(ref.at[rows[:, None], head, dims[None, :]], mask=is_there, other=0.0).astype(jnp.float32)

    def load_scale(kv_head, dims):
        return _load_row(scale_ref, kv_head, dims, plan.head_dim, other=1.0)

    def store(out):
        bits = jnp.arange(plan.bits)
        is_there = (rows < plan.batch)[:, None] & (bits < plan.code_bits)[None, :]
        plgpu.store(sums_ref.at[part, rows[:, None], head, bits[None, :]], out, mask=is_there)

    def hash_query():
        kv_head = head // plan.group

        def normalise():
            dims = jnp.arange(plan.dims)
            group = [load_rows(queries_ref, kv_head * plan.group + place, dims) for place in range(plan.group)]
            scale = load_scale(kv_head, dims)
            squares = jnp.sum(sum(jnp.square(x * scale) for x in group), axis=1)
            norm = lax.rsqrt(squares / (plan.group * plan.head_dim) + 1e-12)[:, None]
            return lambda dims: load_rows(queries_ref, head, dims) * load_scale(kv_head, dims) * norm

        store(_apply_part(of_queries, head, part, normalise, plan) * jnp.exp(log_gain_ref[head]))

    def hash_key():
        kv_head = head - plan.q_heads

        def centre(dims):
            mean = _load_row(mean_ref, kv_head, dims, plan.head_dim)
            return (load_rows(keys_ref, kv_head, dims) - mean) / load_scale(kv_head, dims)

        store(_apply_part(of_keys, kv_head, part, lambda: centre, plan))

    pl.when(head < plan.q_heads)(hash_query)
    pl.when(head >= plan.q_heads)(hash_key)


def _finish_kernel(
    sums_ref, keys_ref, values_ref, lengths_ref, _keys, _values, _codes,
    weights_ref, cached_keys_ref, cached_values_ref, cached_codes_ref, *, plan: Plan,
) -> None:  # fmt: skip
    program, sequence = pl.program_id(0), pl.program_id(1)
    rows = plan.q_heads // plan.members

    def add_parts(first, count: int):
        heads, bits = jnp.arange(_power_of_two(count)), jnp.arange(plan.bits)
        is_there = (heads < count)[:, None] & (bits < plan.code_bits)[None, :]
        at = sequence, (first + heads)[:, None], bits[None, :]
        parts = [plgpu.load(sums_ref.at[part, *at], mask=is_there, other=0.0) for part in range(plan.parts)]
        return jnp.sum(sum(parts), axis=0)

    def finish_query():
        outputs = add_parts(program * plan.members, plan.members)
        largest = jnp.max(jnp.abs(outputs))
        weights = jnp.floor(outputs * (plan.limit / jnp.maximum(largest, 1e-30)) + 0.5).astype(jnp.int32)
        bytes_ = (weights & 255).reshape(-1, BYTES, BYTE)
        packed = jnp.sum(bytes_ << (BYTE * jnp.arange(BYTES))[None, :, None], axis=1).reshape(-1)
        places = jnp.arange(plan.bits // BYTES)
        plgpu.store(weights_ref.at[sequence, program, places], packed, mask=places < plan.code_bits // BYTES)

    def append_key():
        head = program - rows
        at = jnp.minimum(lengths_ref[sequence], plan.max_len - 1)
        dims, words = jnp.arange(plan.dims), jnp.arange(plan.bits // WORD_BITS)
        is_dim = dims < plan.head_dim
        key, value = (
            plgpu.load(ref.at[sequence, head, dims], mask=is_dim, other=0.0) for ref in (keys_ref, values_ref)
        )
        ones = jnp.where(add_parts(plan.q_heads + head, 1) > 0, 1, 0).reshape(-1, WORD_BITS)
        code = jnp.sum(ones << jnp.arange(WORD_BITS)[None, :], axis=1).astype(jnp.uint32)
        for row, ref in ((key, cached_keys_ref), (value, cached_values_ref)):
            plgpu.store(ref.at[sequence, at, head, dims], row.astype(ref.dtype), mask=is_dim)
        is_word = words < plan.code_bits // WORD_BITS
        plgpu.store(cached_codes_ref.at[sequence, head, words, at], code, mask=is_word)

    pl.when(program < rows)(finish_query)
    pl.when(program >= rows)(append_key)


def hash_append_pallas_triton(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    of_queries: Networks,
    of_keys: Networks,
    mean: Float[Array, "kv_heads head_dim"],
    scale: Float[Array, "kv_heads head_dim"],
    log_gain: Float[Array, "q_heads"],
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
    limit: int,
    per_kv_head: bool,
    interpret: bool = False,
) -> tuple[
    Int32[Array, "batch heads packed"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """`hash_append`; products in TF32, as XLA's are on a GPU."""
    batch, q_heads, head_dim = queries.shape
    kv_heads, (hidden, code_bits) = keys.shape[1], of_keys.out_kernel.shape[1:]
    max_len = cached_keys.shape[1]
    plan = Plan(batch, q_heads, kv_heads, head_dim, hidden, code_bits, max_len, limit, per_kv_head)
    sums = pl.pallas_call(
        functools.partial(_networks_kernel, plan=plan),
        grid=(plan.parts, q_heads + kv_heads, -(-batch // plan.tile)),
        out_shape=jax.ShapeDtypeStruct((plan.parts, batch, q_heads + kv_heads, code_bits), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="hash_networks",
    )(queries, keys, of_queries, of_keys, mean, scale, log_gain)
    heads = q_heads // plan.members
    caches = cached_keys, cached_values, cached_codes
    packed, *caches = pl.pallas_call(
        functools.partial(_finish_kernel, plan=plan),
        grid=(heads + kv_heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, code_bits // BYTES), jnp.int32),
            *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
        ),
        input_output_aliases={4: 1, 5: 2, 6: 3},  # the caches stay where they are
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="hash_append",
    )(sums, keys, values, lengths, *caches)
    return packed, *caches
