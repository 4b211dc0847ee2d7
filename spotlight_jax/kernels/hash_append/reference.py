"""The transform form of hash functions in plain JAX, and with it the new token in the cache: the kernel's reference.

A key's bits are digits of its coordinates on fitted axes; a query's weights are linear maps of it, added up over the
query heads of each score head and brought to one length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Shaped, UInt32

from spotlight_jax.bits import pack_bits
from spotlight_jax.cache import LayerCache, append
from spotlight_jax.weights import quantise

SPREAD = 4.0  # of a query's scores, so that the ranking loss's margin is neither nothing nor all


class Transform(NamedTuple):
    """One layer's hash functions of the transform form (`selector.transform`)."""

    mean: Float[Array, "kv_heads head_dim"]  # of the keys
    axes: Float[Array, "kv_heads head_dim code_bits"]
    levels: Float[Array, "kv_heads code_bits"]
    bit_weights: Float[Array, "kv_heads head_dim code_bits"]
    head_assignment: Float[Array, "kv_heads score_heads group"]  # 1 where a query head is part of a score head
    log_head_scale: Float[Array, "q_heads"]  # scale of a query head in its score head


def key_digits(
    mean: Float[Array, "kv_heads head_dim"],
    axes: Float[Array, "kv_heads head_dim code_bits"],
    levels: Float[Array, "kv_heads code_bits"],
    keys: Shaped[Array, "*batch kv_heads head_dim"],
) -> Float[Array, "*batch kv_heads code_bits"]:
    """Return what is above 0 where a key's bit is 1: where the level that its coordinate lies in has an odd number.

    A coordinate is (key - mean) . axis + 1/2, cut off at 0 and 1; one between two levels lies in the lower.
    """
    lead = (1,) * (keys.ndim - 2)
    centred = keys.astype(jnp.float32) - mean.reshape(*lead, *mean.shape)
    levels = levels.reshape(*lead, *levels.shape)
    coordinate = jnp.einsum("...kd,kdc->...kc", centred, axes, precision=jax.lax.Precision.HIGHEST) + 0.5
    place = levels * jnp.clip(coordinate, 0.5 / levels, 1 - 0.5 / levels)  # the middles of the outermost levels
    return (jnp.ceil(place) - 1) % 2 - 0.5


def weigh_bits(
    bit_weights: Float[Array, "kv_heads head_dim code_bits"],
    log_head_scale: Float[Array, "q_heads"],
    queries: Shaped[Array, "*batch q_heads head_dim"],
) -> Float[Array, "*batch q_heads code_bits"]:
    """Return each query head's weight of each bit, times the head's scale."""
    grouped = queries.astype(jnp.float32).reshape(*queries.shape[:-2], bit_weights.shape[0], -1, queries.shape[-1])
    weights = jnp.einsum("...kgd,kdc->...kgc", grouped, bit_weights).reshape(*queries.shape[:-1], bit_weights.shape[-1])
    return weights * jnp.exp(log_head_scale).reshape((1,) * (queries.ndim - 2) + (-1, 1))


def add_heads(
    head_assignment: Float[Array, "kv_heads score_heads group"], weights: Float[Array, "*batch q_heads code_bits"]
) -> Float[Array, "*batch kv_heads score_heads code_bits"]:
    """Add up the weights of each score head's query heads."""
    grouped = weights.reshape(*weights.shape[:-2], head_assignment.shape[0], -1, weights.shape[-1])
    return jnp.einsum("...kgc,krg->...krc", grouped, head_assignment)


def to_one_length(sums: Float[Array, "*batch score_heads code_bits"]) -> Float[Array, "*batch score_heads code_bits"]:
    """Bring sums to one length, so that scores of each spread by about `SPREAD`."""
    length = jnp.sqrt(jnp.sum(jnp.square(sums), axis=-1, keepdims=True) + 1e-12)
    return sums * (SPREAD / length)


def hash_append_reference(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    transform: Transform,
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
    axis: str | None = None,
) -> tuple[
    Shaped[Array, "batch q_heads head_dim"],
    Int8[Array, "batch kv_heads score_heads code_bits"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """Compute `hash_append` by the functions that training and prefill hash with."""
    mean, axes, levels, bit_weights, head_assignment, log_head_scale = transform
    weights = add_heads(head_assignment, weigh_bits(bit_weights, log_head_scale, queries[:, None]))
    weights = quantise(to_one_length(weights))[:, 0]
    digits = key_digits(mean, axes, levels, keys[:, None])
    codes = jnp.moveaxis(pack_bits(digits > 0), 1, -1)
    layer = LayerCache(cached_keys, cached_values, cached_codes)
    layer = append(layer, keys[:, None], values[:, None], codes, lengths, axis)
    assert layer.codes is not None
    return queries, weights.astype(jnp.int8), layer.keys, layer.values, layer.codes
