"""Hash functions as after training: every array differs from where training starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.selector.base import HashFunctions, HeadShape
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.networks import NetworkHash


@functools.cache
def draw_params(cfg: HashConfig, shape: HeadShape, seed: int = 1) -> HashFunctions:
    """Params for keys of about unit size. In the transform form an axis has four digits, and every second query head
    of a group is in the second sum."""
    rng = np.random.default_rng(seed)
    params = init_functions(jax.random.key(seed), cfg, shape)

    def move(leaf, size=0.1):
        return leaf + jnp.asarray(rng.normal(0, size, leaf.shape), jnp.float32)

    weights, stats = jax.tree.map(move, params.weights), params.stats
    if isinstance(params, NetworkHash):
        return params.replace(weights=weights, stats=stats.replace(mean=move(stats.mean), scale=stats.scale * 1.5))
    digit = np.arange(cfg.code_bits) % 4
    sums = np.arange(stats.head_assignment.shape[-2])[:, None]
    coder = dataclasses.replace(
        stats,
        mean=move(stats.mean),
        axes=stats.axes[..., np.arange(cfg.code_bits) - digit] / 4,
        levels=jnp.broadcast_to(jnp.asarray(2.0 ** (digit + 1), jnp.float32), stats.levels.shape),
        head_assignment=jnp.broadcast_to(
            jnp.float32(np.arange(shape.group) % len(sums) == sums), stats.head_assignment.shape
        ),
    )
    return params.replace(weights=weights, stats=coder)
