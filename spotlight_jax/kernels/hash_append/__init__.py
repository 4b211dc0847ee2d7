"""All that a decoding step does before it scores, as one op: query weights, and the new token appended to the cache."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.hash_append.reference import Networks, hash_append_reference
from spotlight_jax.kernels.trust import is_trusted

__all__ = ["HashAppendImpl", "Networks", "hash_append", "is_fused"]

HashAppendImpl = Literal["reference", "pallas_triton"]


def is_fused() -> bool:
    """Whether the kernels run here: on a GPU that passes their check."""
    return is_trusted("hash_append", _agree)


def _agree() -> bool:
    """Kernels and reference on two ragged sequences; in TF32 a weight may be one off, a bit of a key next to 0 flip."""
    draws = iter(jax.random.split(jax.random.key(0), 32))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(draws), shape) * (shape[1] ** -0.5 if len(shape) == 3 else 1.0)

    def networks(heads: int) -> Networks:
        shapes = (heads, 64, 160), (heads, 160), (heads, 160, 64), (heads, 64), (heads, 64, 64)
        return Networks(*(draw(*shape) for shape in shapes))

    rows = draw(2, 6, 64), draw(2, 2, 64), draw(2, 2, 64)
    fitted = networks(6), networks(2), draw(2, 64), jnp.ones((2, 64)), draw(6)
    codes = jax.random.bits(next(draws), (2, 2, 2, 256), jnp.uint32)
    call = *rows, *fitted, draw(2, 256, 2, 64), draw(2, 256, 2, 64), codes, jnp.asarray([7, 255], jnp.int32)
    run = functools.partial(hash_append, limit=7, per_kv_head=True)
    found, expected = (jax.jit(functools.partial(run, impl=impl))(*call) for impl in ("pallas_triton", "reference"))
    weights, other_weights = (jax.lax.bitcast_convert_type(packed, jnp.int8) for packed, *_ in (found, expected))
    off = jnp.abs(weights - other_weights)
    flipped = jnp.sum(jax.lax.population_count(found[3] ^ expected[3]))
    is_copied = all(bool(jnp.array_equal(*pair)) for pair in zip(found[1:3], expected[1:3], strict=True))
    return is_copied and bool(jnp.max(off) <= 1) and bool(jnp.mean(off) < 0.05) and bool(flipped <= 4)


def hash_append(
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
    impl: HashAppendImpl = "pallas_triton",
) -> tuple[
    Int32[Array, "batch heads packed"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """A token's query weights, and the caches with its keys, values and codes at positions `lengths`.

    Outputs are `exp(log_gain) * network(normalised query * scale)`, and weights are outputs in whole numbers, the
    largest of a row `limit`. Codes are the signs of `network((key - mean) / scale)`.

    Args:
        queries: after RoPE; each group of query heads is brought to unit root mean square as a whole, scaled.
        keys: after RoPE.
        values: of the same token.
        of_queries: a network for each query head.
        of_keys: a network for each KV head.
        mean: of the keys.
        scale: of each dimension.
        log_gain: of each query head.
        cached_keys: changed in place where the caller gives them away (donated, or carried by a loop).
        cached_values: as the keys.
        cached_codes: as the keys; bit b of a code is bit b % 32 of word b // 32.
        lengths: tokens each sequence has cached before this one; a token that does not fit takes the last place.
        limit: greatest magnitude of a weight, at most 127.
        per_kv_head: outputs are summed over each group, for one row of weights a KV head.

    Returns: weights as `score_select` takes them, and the caches.
    """
    backends: dict[str, Callable[..., tuple[Array, Array, Array, Array]]] = {
        "reference": hash_append_reference,
        "pallas_triton": hash_append_pallas_triton,
    }
    inputs = queries, keys, values, of_queries, of_keys, mean, scale, log_gain
    return backends[impl](*inputs, cached_keys, cached_values, cached_codes, lengths, limit, per_kv_head)
