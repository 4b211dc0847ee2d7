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
        """head_dim, up to a power of two that a product on tensor cores can have."""
        return max(_power_of_two(self.head_dim), TILE)

    @property
    def bits(self) -> int:
        """code_bits, up to a power of two."""
        return _power_of_two(self.code_bits)


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
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
        """The block in float32, zeros outside of the array."""
        return jnp.where(self.is_there, self.values.astype(jnp.float32), 0.0)


def _ask_row(ref, head, columns, count: int) -> _Asked:
    """Some of one head's vector."""
    is_there = (columns < count)[None, :]
    return _Asked(plgpu.load(ref.at[head, columns[None, :]], mask=is_there), is_there)


def _ask_block(ref, head, rows, columns, row_count: int, column_count: int) -> _Asked:
    """Some of one head's matrix."""
    is_there = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return _Asked(plgpu.load(ref.at[head, rows[:, None], columns[None, :]], mask=is_there), is_there)


def _apply_part(
    refs: Networks, head, part, ask_inputs: Callable[..., Callable[[], list[Array]]], plan: Plan
) -> Float[Array, "tile bits"]:
    """What a part adds to its head's output.

    Args:
        ask_inputs: asks for a head's inputs in each of the given dimensions; what it returns gives them.
    """
    dims, bits = jnp.arange(plan.dims), jnp.arange(plan.bits)
    own = part * SHARE + jnp.arange(SHARE)
    hidden_kernel = _ask_block(refs.hidden_kernel, head, dims, own, plan.head_dim, plan.hidden)
    hidden_bias = _ask_row(refs.hidden_bias, head, own, plan.hidden)
    out_kernel = _ask_block(refs.out_kernel, head, own, bits, plan.hidden, plan.code_bits)
    out_bias = _ask_row(refs.out_bias, head, bits, plan.code_bits)
    rotation = _ask_block(refs.rotation, head, own, bits, plan.head_dim, plan.code_bits)
    x, own_x = ask_inputs(dims, own)()
    out = plgpu.dot(own_x, rotation.get()) + jnp.where(part == 0, out_bias.get(), 0.0)
    hidden = plgpu.dot(x, hidden_kernel.get()) + hidden_bias.get()
    return out + plgpu.dot(hidden / (1.0 + jnp.exp(-hidden)), out_kernel.get())


def _networks_kernel(
    queries_ref, keys_ref, of_queries: Networks, of_keys: Networks, mean_ref, scale_ref, log_gain_ref, sums_ref, *,
    plan: Plan,
) -> None:  # fmt: skip
    part, head = pl.program_id(0), pl.program_id(1)
    rows = pl.program_id(2) * plan.tile + jnp.arange(plan.tile)
    is_row = (rows < plan.batch)[:, None]

    def ask_rows(ref, head, dims):
        is_there = is_row & (dims < plan.head_dim)[None, :]
        return _Asked(plgpu.load(ref.at[rows[:, None], head, dims[None, :]], mask=is_there), is_there)

    def store(out):
        bits = jnp.arange(plan.bits)
        is_there = is_row & (bits < plan.code_bits)[None, :]
        plgpu.store(sums_ref.at[part, rows[:, None], head, bits[None, :]], out, mask=is_there)

    def hash_query():
        kv_head, gain = head // plan.group, jnp.exp(log_gain_ref[head])

        def ask_inputs(*ranges):
            x = [ask_rows(queries_ref, head, dims) for dims in ranges]
            scales = [_ask_row(scale_ref, kv_head, dims, plan.head_dim) for dims in ranges]
            group = [ask_rows(queries_ref, kv_head * plan.group + place, ranges[0]) for place in range(plan.group)]

            def normalise():
                squares = sum(jnp.square(row.get() * scales[0].get()) for row in group)
                mean_square = jnp.sum(squares, axis=1)[:, None] / (plan.group * plan.head_dim)
                norm = lax.rsqrt(mean_square + 1e-12)
                return [row.get() * scale.get() * norm for row, scale in zip(x, scales, strict=True)]

            return normalise

        store(_apply_part(of_queries, head, part, ask_inputs, plan) * gain)

    def hash_key():
        kv_head = head - plan.q_heads

        def ask_inputs(*ranges):
            x = [ask_rows(keys_ref, kv_head, dims) for dims in ranges]
            means = [_ask_row(mean_ref, kv_head, dims, plan.head_dim) for dims in ranges]
            scales = [_ask_row(scale_ref, kv_head, dims, plan.head_dim) for dims in ranges]

            def centre():
                return [
                    jnp.where(row.is_there, (row.get() - mean.get()) / scale.get(), 0.0)
                    for row, mean, scale in zip(x, means, scales, strict=True)
                ]

            return centre

        store(_apply_part(of_keys, kv_head, part, ask_inputs, plan))

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
