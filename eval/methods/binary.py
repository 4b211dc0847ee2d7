"""Binary: a real query against binary keys, untrained: how far the form alone goes.

Forms with networks start better than this: they balance the spreads of both sides of the dot product
(`networks.balance`).
"""

import jax

from eval.methods.base import Setting, rule_of
from eval.methods.lsh import code_bits
from eval.methods.spotlight import HashCodes
from spotlight_jax.config.hashing import NetworkConfig
from spotlight_jax.selector.forms import init_functions


def open_binary(name: str, setting: Setting) -> HashCodes:
    """Open random rotations of queries, and of keys brought to mean 0 and spread 1; the keys' signs alone are kept."""
    cfg = NetworkConfig("asymmetric", code_bits(setting), hidden=1)
    params = init_functions(jax.random.key(setting.seed), cfg, setting.shape)
    selection = setting.selection
    return HashCodes(name, rule_of(selection), selection.dense_layers, params, stats="own mean and spread")
