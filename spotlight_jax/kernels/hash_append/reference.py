"""Sums of queries times a matrix, integer weights; a key's coordinates cut into cells, digits: as they are written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Shaped, UInt32

from spotlight_jax.bits import pack_bits
from spotlight_jax.weights import quantise


class Transform(NamedTuple):
    """One layer's hash functions of the transform form (`hashing.Coder`, `hashing.TransformWeights`)."""

    mean: Float[Array, "kv_heads head_dim"]  # of the keys
    axes: Float[Array, "kv_heads head_dim code_bits"]
    cells: Float[Array, "kv_heads code_bits"]
    decode: Float[Array, "kv_heads head_dim code_bits"]
    members: Float[Array, "kv_heads sums group"]  # 1 where a query head is part of a sum
    log_gain: Float[Array, "q_heads"]  # what a query head counts in its sum


def hash_append_reference(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    transform: Transform,
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
) -> tuple[
    Shaped[Array, "batch q_heads head_dim"],
    Int8[Array, "batch kv_heads sums code_bits"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """`hash_append` in plain XLA."""
    batch, kv_heads, head_dim = keys.shape
    exact = jax.lax.Precision.HIGHEST
    grouped = queries.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim)
    shares = transform.members * jnp.exp(transform.log_gain).reshape(kv_heads, 1, -1)
    sums = jnp.einsum("bkgd,krg->bkrd", grouped, shares, precision=exact)
    weights = jnp.einsum("bkrd,kdc->bkrc", sums, transform.decode, precision=exact)
    weights = weights * jax.lax.rsqrt(jnp.sum(jnp.square(weights), axis=-1, keepdims=True) + 1e-12)

    centred = keys.astype(jnp.float32) - transform.mean[None]
    coordinates = jnp.einsum("bkd,kdc->bkc", centred, transform.axes, precision=exact) + 0.5
    cells = transform.cells[None]
    cell = jnp.ceil(cells * jnp.clip(coordinates, 0.5 / cells, 1 - 0.5 / cells)) - 1
    codes = pack_bits(cell % 2)

    rows = jnp.arange(batch, dtype=jnp.int32)
    at = jnp.minimum(lengths, cached_keys.shape[1] - 1)
    return (
        queries,
        quantise(weights).astype(jnp.int8),
        cached_keys.at[rows, at].set(keys.astype(cached_keys.dtype)),
        cached_values.at[rows, at].set(values.astype(cached_values.dtype)),
        cached_codes.at[rows, :, :, at].set(codes),
    )
