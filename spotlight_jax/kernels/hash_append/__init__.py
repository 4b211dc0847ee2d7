"""All that a decoding step does before it scores, as one op: query weights, and the new token appended to the cache."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32, Shaped, UInt32

from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.hash_append.reference import Transform, hash_append_reference
from spotlight_jax.kernels.trust import is_trusted

__all__ = ["HashAppendImpl", "Transform", "choose_impl", "hash_append"]

HashAppendImpl = Literal["auto", "reference", "pallas_triton"]


def choose_impl() -> HashAppendImpl:
    """Return what `auto` takes: the kernel on a GPU that passes its check, plain XLA elsewhere."""
    return "pallas_triton" if is_trusted("hash_append", _agree) else "reference"


def _agree() -> bool:
    """Return whether kernel and reference agree on two ragged sequences, but for a few bits and weights at an edge."""
    draws = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(draws), shape)

    digits = jnp.tile(2.0 ** (1 + jnp.arange(128) % 4), (2, 1))
    transform = Transform(draw(2, 64), draw(2, 64, 128) / 32, digits, draw(2, 64, 128), jnp.abs(draw(2, 2, 3)), draw(6))
    rows = draw(2, 6, 64), draw(2, 2, 64), draw(2, 2, 64)
    codes = jax.random.bits(next(draws), (2, 2, 4, 256), jnp.uint32)
    call = *rows, transform, draw(2, 256, 2, 64), draw(2, 256, 2, 64), codes, jnp.asarray([7, 255], jnp.int32)
    found = jax.jit(functools.partial(hash_append, impl="pallas_triton"))(*call)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(hash_append, impl="reference"))(*call)
    off = jnp.abs(found[1].astype(jnp.int32) - expected[1].astype(jnp.int32))
    flipped = jnp.sum(jax.lax.population_count(found[4] ^ expected[4]))
    is_copied = all(bool(jnp.array_equal(found[place], expected[place])) for place in (0, 2, 3))
    return is_copied and bool(jnp.max(off) <= 1) and bool(jnp.mean(off) < 0.05) and bool(flipped <= 4)


def hash_append(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    values: Shaped[Array, "batch kv_heads head_dim"],
    transform: Transform,
    cached_keys: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_values: Shaped[Array, "batch max_len kv_heads head_dim"],
    cached_codes: UInt32[Array, "batch kv_heads words max_len"],
    lengths: Int32[Array, "batch"],
    impl: HashAppendImpl = "auto",
    axis: str | None = None,
) -> tuple[
    Shaped[Array, "batch q_heads head_dim"],
    Int8[Array, "batch kv_heads score_heads code_bits"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    Shaped[Array, "batch max_len kv_heads head_dim"],
    UInt32[Array, "batch kv_heads words max_len"],
]:
    """Return a token's query weights, and the caches with its keys, values and codes at positions `lengths`.

    Weights are `quantise` of a score head's queries, times their scales, . bit_weights, each sum brought to one length.
    A code's bit is the last digit of the level that (key - mean) . axes + 1/2 lies in.

    Args:
        queries: after RoPE.
        keys: after RoPE.
        values: of the same token.
        transform: the layer's hash functions.
        cached_keys: changed in place where the caller gives them away (donated, or carried by a loop).
        cached_values: as the keys.
        cached_codes: as the keys; bit b of a code is bit b % 32 of word b // 32.
        lengths: tokens each sequence has cached before this one; a token that does not fit takes the last place.
        impl: `auto` chooses by device; a named implementation runs or raises.
        axis: over which the caches' positions are split (`token_axis`): one device of it gets the new token.

    Returns:
        The queries as they were given (whoever reads these copies does not have XLA make them once more), weights as
            `score_select` takes them, and the caches.
    """
    backends: dict[str, Callable[..., tuple[Array, Array, Array, Array, Array]]] = {
        "reference": functools.partial(hash_append_reference, axis=axis),
        "pallas_triton": functools.partial(hash_append_pallas_triton, axis=axis),
    }
    caches = cached_keys, cached_values, cached_codes
    run = pick_backend("hash_append", backends, impl, choose_impl)
    return run(queries, keys, values, transform, *caches, lengths)
