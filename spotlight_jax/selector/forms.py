"""Hash functions by their config: the one place that chooses a form."""

import jax
from jaxtyping import PRNGKeyArray

from spotlight_jax.config.hashing import HashConfig, NetworkConfig
from spotlight_jax.selector import networks, transform
from spotlight_jax.selector.base import HashFunctions, HeadShape


def check_widths(cfg: HashConfig, shape: HeadShape) -> None:
    """Raise InputError where a config does not fit a model's heads."""
    if isinstance(cfg, NetworkConfig):
        networks.check_widths(cfg, shape)


def init_functions(key: PRNGKeyArray, cfg: HashConfig, shape: HeadShape) -> HashFunctions:
    """Draw hash functions of every layer before anything is known of keys (see `HashFunctions.fit`).

    Raises: InputError as `check_widths`.
    """
    check_widths(cfg, shape)

    def init(layer_key: PRNGKeyArray) -> HashFunctions:
        if isinstance(cfg, NetworkConfig):
            return networks.init_layer(layer_key, cfg, shape)
        return transform.init_layer(layer_key, cfg, shape)

    return jax.vmap(init)(jax.random.split(key, shape.layers))
