"""The transform form of hash functions, in plain JAX: what its kernel (`kernels/hash_append`) is compared with.

A key's bits are digits of its coordinates on fitted axes; a query's weights are linear maps of it, added up over the
query heads of each sum and brought to one length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

SPREAD = 4.0  # of a query's scores, so that the ranking loss's margin is neither nothing nor all


class Transform(NamedTuple):
    """One layer's hash functions (`hashing.Coder`, `hashing.TransformWeights`)."""

    mean: Float[Array, "kv_heads head_dim"]  # of the keys
    axes: Float[Array, "kv_heads head_dim code_bits"]
    cells: Float[Array, "kv_heads code_bits"]
    decode: Float[Array, "kv_heads head_dim code_bits"]
    members: Float[Array, "kv_heads sums group"]  # 1 where a query head is part of a sum
    log_gain: Float[Array, "q_heads"]  # what a query head counts in its sum


def key_digits(
    mean: Float[Array, "kv_heads head_dim"],
    axes: Float[Array, "kv_heads head_dim code_bits"],
    cells: Float[Array, "kv_heads code_bits"],
    keys: Shaped[Array, "*batch kv_heads head_dim"],
) -> Float[Array, "*batch kv_heads code_bits"]:
    """The result is above 0 where a key's bit is 1: where the cell that its coordinate lies in has an odd number.

    A coordinate is (key - mean) . axis + 1/2, cut off at 0 and 1; one between two cells lies in the lower.
    """
    lead = (1,) * (keys.ndim - 2)
    centred = keys.astype(jnp.float32) - mean.reshape(*lead, *mean.shape)
    cells = cells.reshape(*lead, *cells.shape)
    coordinate = jnp.einsum("...kd,kdc->...kc", centred, axes, precision=jax.lax.Precision.HIGHEST) + 0.5
    place = cells * jnp.clip(coordinate, 0.5 / cells, 1 - 0.5 / cells)  # the middles of the outermost cells
    return (jnp.ceil(place) - 1) % 2 - 0.5


def bit_weights(
    decode: Float[Array, "kv_heads head_dim code_bits"],
    log_gain: Float[Array, "q_heads"],
    queries: Shaped[Array, "*batch q_heads head_dim"],
) -> Float[Array, "*batch q_heads code_bits"]:
    """What each bit is worth to each query head, times the head's gain."""
    grouped = queries.astype(jnp.float32).reshape(*queries.shape[:-2], decode.shape[0], -1, queries.shape[-1])
    weights = jnp.einsum("...kgd,kdc->...kgc", grouped, decode).reshape(*queries.shape[:-1], decode.shape[-1])
    return weights * jnp.exp(log_gain).reshape((1,) * (queries.ndim - 2) + (-1, 1))


def add_heads(
    members: Float[Array, "kv_heads sums group"], weights: Float[Array, "*batch q_heads code_bits"]
) -> Float[Array, "*batch kv_heads sums code_bits"]:
    """The weights of each sum's query heads, added up."""
    grouped = weights.reshape(*weights.shape[:-2], members.shape[0], -1, weights.shape[-1])
    return jnp.einsum("...kgc,krg->...krc", grouped, members)


def to_one_length(sums: Float[Array, "*batch sums code_bits"]) -> Float[Array, "*batch sums code_bits"]:
    """Sums of one length, so that scores of each spread by about `SPREAD`."""
    length = jnp.sqrt(jnp.sum(jnp.square(sums), axis=-1, keepdims=True) + 1e-12)
    return sums * (SPREAD / length)
