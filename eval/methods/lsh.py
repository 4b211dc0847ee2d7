"""LSH: random hyperplanes, the same for queries and keys; a score is the number of equal bits."""

import dataclasses

import jax

from eval.methods.base import Setting, rule_of
from eval.methods.spotlight import HashCodes
from spotlight_jax import hashing
from spotlight_jax.config.hashing import HashConfig

DEFAULT_BITS = 128


def code_bits(setting: Setting) -> int:
    """Return as many bits as the selector that is given has."""
    return DEFAULT_BITS if setting.selector is None else setting.selector.cfg.code_bits


def open_lsh(name: str, setting: Setting) -> HashCodes:
    """`lsh` has orthogonal planes (the fair baseline), `lsh-gaussian` independent ones; `-centred` hashes keys relative
    to the mean of the sequence's keys."""
    cfg = HashConfig("symmetric", code_bits(setting), skip="rotation", hidden=1, centre="centred" in name)
    params = hashing.init_params(jax.random.key(setting.seed), cfg, setting.shape)
    if "gaussian" in name:
        assert isinstance(params.weights, hashing.NetworkWeights)
        network = params.weights.keys
        size = (setting.shape.layers, setting.shape.kv_heads, setting.shape.head_dim, cfg.code_bits)
        network = dataclasses.replace(network, rotation=jax.random.normal(jax.random.key(setting.seed), size))
        params = dataclasses.replace(params, weights=dataclasses.replace(params.weights, keys=network))
    selection = setting.selection
    return HashCodes(name, rule_of(selection), selection.dense_layers, params, cfg=cfg, stats="own mean")
