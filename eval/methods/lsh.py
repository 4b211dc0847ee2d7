"""LSH: random hyperplanes, the same for queries and keys; a score is the number of equal bits."""

import dataclasses

import jax

from eval.methods.base import Setting, rule_of
from eval.methods.spotlight import HashCodes
from spotlight_jax.selector.networks import orthogonal_lsh

DEFAULT_BITS = 128


def code_bits(setting: Setting) -> int:
    """Return as many bits as the selector that is given has."""
    return DEFAULT_BITS if setting.selector is None else setting.selector.cfg.code_bits


def open_lsh(name: str, setting: Setting) -> HashCodes:
    """`lsh` has orthogonal planes (the fair baseline), `lsh-gaussian` independent ones; `-centred` hashes keys relative
    to the mean of the sequence's keys."""
    params = orthogonal_lsh(jax.random.key(setting.seed), code_bits(setting), setting.shape, centre="centred" in name)
    if "gaussian" in name:
        network = params.weights.keys
        assert network.rotation is not None, "orthogonal LSH is a rotation"
        rotation = jax.random.normal(jax.random.key(setting.seed), network.rotation.shape)
        weights = dataclasses.replace(params.weights, keys=dataclasses.replace(network, rotation=rotation))
        params = dataclasses.replace(params, weights=weights)
    selection = setting.selection
    return HashCodes(name, rule_of(selection), selection.dense_layers, params, stats="own mean")
