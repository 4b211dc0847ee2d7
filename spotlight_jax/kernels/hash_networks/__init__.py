"""Both sides of a decoding step's hashing, every head's network at once: query outputs and packed key codes."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float, Shaped, UInt32

from spotlight_jax.kernels.hash_networks.pallas_triton import hash_networks_pallas_triton
from spotlight_jax.kernels.hash_networks.reference import Networks, hash_networks_reference

__all__ = ["HashNetworksImpl", "Networks", "hash_networks", "is_fused"]

HashNetworksImpl = Literal["reference", "pallas_triton"]


def is_fused() -> bool:
    """Whether the kernel runs here: on a GPU."""
    return jax.default_backend() == "gpu"


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
