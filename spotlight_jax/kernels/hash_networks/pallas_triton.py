"""Both sides of a decoding step's hashing in one kernel.

A program owns one KV head's whole network, or a part of one query head's: some of its hidden units, or its rotation.
Parts are added up outside, where the query heads of a group are too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Shaped, UInt32

from spotlight_jax.kernels.hash_networks.reference import WORD_BITS, Networks

ROWS = 16  # sequences of a program: what a product on tensor cores has at least
HIDDEN = 32  # hidden units at once
HIDDEN_OF_PART = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    code_bits: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def parts(self) -> int:
        """Of a query head's network: hidden units in pieces, and its rotation."""
        return -(-self.hidden // HIDDEN_OF_PART) + 1

    @property
    def dims(self) -> int:
        """head_dim, up to a power of two."""
        return max(_power_of_two(self.head_dim), ROWS)

    @property
    def bits(self) -> int:
        """code_bits, up to a power of two."""
        return _power_of_two(self.code_bits)


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()


def _load_row(ref, head, columns, count: int, other: float = 0.0) -> Float[Array, "columns"]:
    """Some of one head's vector; `other` outside of it."""
    return plgpu.load(ref.at[head, columns], mask=columns < count, other=other)


def _load(ref, head, rows, columns, plan_rows: int, plan_columns: int) -> Float[Array, "rows columns"]:
    """Some of one head's matrix; zeros outside of it."""
    is_there = (rows < plan_rows)[:, None] & (columns < plan_columns)[None, :]
    return plgpu.load(ref.at[head, rows[:, None], columns[None, :]], mask=is_there, other=0.0)


def _hidden_part(refs: Networks, head, x, first, count: int, plan: Plan) -> Float[Array, "rows bits"]:
    """What hidden units `first` to `first + count` add to a network's output."""
    dims, bits = jnp.arange(plan.dims), jnp.arange(plan.bits)

    def add_units(step, total):
        units = first + step * HIDDEN + jnp.arange(HIDDEN)
        kernel = _load(refs.hidden_kernel, head, dims, units, plan.head_dim, plan.hidden)
        bias = _load_row(refs.hidden_bias, head, units, plan.hidden)
        hidden = plgpu.dot(x, kernel) + bias[None, :]
        hidden = hidden / (1.0 + jnp.exp(-hidden))
        out_kernel = _load(refs.out_kernel, head, units, bits, plan.hidden, plan.code_bits)
        return total + plgpu.dot(hidden, out_kernel)

    return lax.fori_loop(0, -(-count // HIDDEN), add_units, jnp.zeros((ROWS, plan.bits), jnp.float32))


def _rotation_part(refs: Networks, head, x, plan: Plan) -> Float[Array, "rows bits"]:
    """What the rotation and the bias add."""
    dims, bits = jnp.arange(plan.dims), jnp.arange(plan.bits)
    bias = _load_row(refs.out_bias, head, bits, plan.code_bits)
    return plgpu.dot(x, _load(refs.rotation, head, dims, bits, plan.head_dim, plan.code_bits)) + bias[None, :]


def _kernel(
    queries_ref, keys_ref, of_queries: Networks, of_keys: Networks, mean_ref, scale_ref, gain_ref,
    weights_ref, codes_ref, *, plan: Plan,
) -> None:  # fmt: skip
    program = pl.program_id(0)
    rows = pl.program_id(1) * ROWS + jnp.arange(ROWS)
    dims, bits = jnp.arange(plan.dims), jnp.arange(plan.bits)
    is_dim, is_row = dims < plan.head_dim, rows < plan.batch

    def load_rows(ref, head):
        x = plgpu.load(ref.at[rows[:, None], head, dims[None, :]], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        return x.astype(jnp.float32)

    def hash_query():
        head, part = program // plan.parts, program % plan.parts
        kv_head = head // plan.group
        scale = _load_row(scale_ref, kv_head, dims, plan.head_dim)[None, :]
        squares = jnp.zeros((ROWS,), jnp.float32)
        for place in range(plan.group):
            squares = squares + jnp.sum(
                jnp.square(load_rows(queries_ref, kv_head * plan.group + place) * scale), axis=1
            )
        x = load_rows(queries_ref, head) * scale
        x = x * lax.rsqrt(squares / (plan.group * plan.head_dim) + 1e-12)[:, None]

        def store(out):
            is_there = is_row[:, None] & (bits < plan.code_bits)[None, :]
            at = (part, rows[:, None], head, bits[None, :])
            plgpu.store(weights_ref.at[at], out * gain_ref[head], mask=is_there)

        def store_hidden():
            store(_hidden_part(of_queries, head, x, part * HIDDEN_OF_PART, min(HIDDEN_OF_PART, plan.hidden), plan))

        pl.when(part < plan.parts - 1)(store_hidden)
        pl.when(part == plan.parts - 1)(lambda: store(_rotation_part(of_queries, head, x, plan)))

    def hash_key():
        head = program - plan.q_heads * plan.parts
        mean = _load_row(mean_ref, head, dims, plan.head_dim)[None, :]
        scale = _load_row(scale_ref, head, dims, plan.head_dim, other=1.0)[None, :]
        x = (load_rows(keys_ref, head) - mean) / scale
        out = _hidden_part(of_keys, head, x, 0, plan.hidden, plan) + _rotation_part(of_keys, head, x, plan)
        ones = jnp.where(out > 0, 1, 0).reshape(ROWS, plan.bits // WORD_BITS, WORD_BITS)
        words = jnp.sum(ones << jnp.arange(WORD_BITS)[None, None, :], axis=2)
        places = jnp.arange(plan.bits // WORD_BITS)
        is_there = is_row[:, None] & (places < plan.code_bits // WORD_BITS)[None, :]
        plgpu.store(codes_ref.at[rows[:, None], head, places[None, :]], words, mask=is_there)

    pl.when(program < plan.q_heads * plan.parts)(hash_query)
    pl.when(program >= plan.q_heads * plan.parts)(hash_key)


def hash_networks_pallas_triton(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    of_queries: Networks,
    of_keys: Networks,
    mean: Float[Array, "kv_heads head_dim"],
    scale: Float[Array, "kv_heads head_dim"],
    gain: Float[Array, "q_heads"],
    interpret: bool = False,
) -> tuple[Float[Array, "batch q_heads code_bits"], UInt32[Array, "batch kv_heads words"]]:
    """`hash_networks`; products in TF32, as XLA's are on a GPU."""
    batch, q_heads, head_dim = queries.shape
    kv_heads, (hidden, code_bits) = keys.shape[1], of_keys.out_kernel.shape[1:]
    plan = Plan(batch, q_heads, kv_heads, head_dim, hidden, code_bits)
    inputs = (queries, keys, of_queries, of_keys, mean, scale, gain)
    weights, codes = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(q_heads * plan.parts + kv_heads, -(-batch // ROWS)),
        out_shape=(
            jax.ShapeDtypeStruct((plan.parts, batch, q_heads, code_bits), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, code_bits // WORD_BITS), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="hash_networks",
    )(*inputs)
    return jnp.sum(weights, axis=0), lax.bitcast_convert_type(codes, jnp.uint32)
