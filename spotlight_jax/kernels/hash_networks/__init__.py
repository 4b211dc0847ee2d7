"""Both sides of a decoding step's hashing, every head's network at once: query outputs and packed key codes."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from spotlight_jax.kernels.hash_networks.pallas_triton import hash_networks_pallas_triton
from spotlight_jax.kernels.hash_networks.reference import Networks, hash_networks_reference
from spotlight_jax.kernels.trust import is_trusted

__all__ = ["HashNetworksImpl", "Networks", "hash_networks", "is_fused"]

HashNetworksImpl = Literal["reference", "pallas_triton"]


def is_fused() -> bool:
    """Whether the kernel runs here: on a GPU that passes its check."""
    return is_trusted("hash_networks", _agree)


def _agree() -> bool:
    """Kernel and reference on two sequences; in TF32 a few bits of keys next to 0 may differ."""
    draws = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(draws), shape) * (shape[1] ** -0.5 if len(shape) == 3 else 1.0)

    def networks(heads: int) -> Networks:
        return Networks(
            draw(heads, 64, 160), draw(heads, 160), draw(heads, 160, 64), draw(heads, 64), draw(heads, 64, 64)
        )

    call = draw(2, 6, 64), draw(2, 2, 64), networks(6), networks(2), draw(2, 64), jnp.ones((2, 64)), draw(6)
    found, expected = (
        jax.jit(functools.partial(hash_networks, impl=impl))(*call) for impl in ("pallas_triton", "reference")
    )
    flipped = jnp.mean(jax.lax.population_count(found[1] ^ expected[1]).astype(jnp.float32)) / 32
    return bool(jnp.allclose(found[0], expected[0], atol=2e-2 * jnp.max(jnp.abs(expected[0])))) and bool(flipped < 0.02)


def hash_networks(
    queries: Shaped[Array, "batch q_heads head_dim"],
    keys: Shaped[Array, "batch kv_heads head_dim"],
    of_queries: Networks,
    of_keys: Networks,
    mean: Float[Array, "kv_heads head_dim"],
    scale: Float[Array, "kv_heads head_dim"],
    gain: Float[Array, "q_heads"],
    impl: HashNetworksImpl = "pallas_triton",
) -> tuple[Float[Array, "batch q_heads code_bits"], UInt32[Array, "batch kv_heads words"]]:
    """Query outputs `gain * network(normalised query * scale)`, and the signs of `network((key - mean) / scale)`.

    Args:
        queries: after RoPE; each group of query heads is brought to unit root mean square as a whole, scaled.
        keys: after RoPE.
        of_queries: a network for each query head.
        of_keys: a network for each KV head.
        mean: of the keys.
        scale: of each dimension.
        gain: of each query head.

    Returns: outputs, and codes in which bit b is bit b % 32 of word b // 32.
    """
    backends: dict[str, Callable[..., tuple[Array, Array]]] = {
        "reference": hash_networks_reference,
        "pallas_triton": hash_networks_pallas_triton,
    }
    return backends[impl](queries, keys, of_queries, of_keys, mean, scale, gain)
