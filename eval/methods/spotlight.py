"""Spotlight: the learned hash functions of a selector. Other methods that score codes are built from the same class."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree, UInt32

from eval.methods.base import Keys, Positions, Queries, ScoreMethod, Setting, key_moments, rule_of
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.scoring import hash_score_range, hash_scores
from spotlight_jax.tail import TailParams


@flax.struct.dataclass
class HashCodes(ScoreMethod):
    """Packed codes of the keys, scored as decoding does.

    `params` are `HashFunctions`, whose leaves have an axis of sets after the layers' where there are `shorter`.
    """

    # where keys are taken to lie: as measured in training, or as this sequence's keys do
    stats: Literal["trained", "own mean", "own mean and spread"] = flax.struct.field(
        pytree_node=False, default="trained"
    )
    # tokens of the longest sequences that each set but the last is for; see `checkpoint.Selector`
    shorter: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def index(
        self, keys: Keys, lengths: Int32[Array, "batch"]
    ) -> tuple[HashFunctions, UInt32[Array, "batch code_heads words kv_len"]]:
        """Return the hash functions for sequences of this length (the longest one's), and codes of the keys."""
        params: HashFunctions = self.params
        if self.shorter:
            which = jnp.searchsorted(jnp.asarray(self.shorter, jnp.int32), jnp.max(lengths))
            params = jax.tree.map(lambda leaf: leaf[which], params)
        if self.stats != "trained":
            mean, spread = key_moments(keys, lengths)
            scale = spread if self.stats == "own mean and spread" else jnp.ones_like(spread)
            params = dataclasses.replace(params, stats=dataclasses.replace(params.stats, mean=mean, scale=scale))
        return params, params.key_codes(keys)

    def tail_params(self, index: PyTree) -> TailParams | None:
        """Return those of the hash functions for this length, where they have some."""
        return self.tail if self.tail is None or index[0].tail is None else index[0].tail

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Int32[Array, "batch n heads kv_len"]:
        """See `scoring.hash_scores`."""
        params, codes = index
        return hash_scores(params, queries, codes, self.per_kv_head)

    def score_range(self, queries: Queries, keys: Keys) -> tuple[int, int]:
        """See `scoring.hash_score_range`."""
        return hash_score_range(self.params, queries.shape[2] // keys.shape[2], self.per_kv_head)

    def index_bytes(self, keys: Keys, index: PyTree) -> int:
        """Return the bytes of a token's codes, all words."""
        codes = index[1]
        return codes.shape[1] * codes.shape[2] * codes.dtype.itemsize


def open_spotlight(name: str, setting: Setting) -> HashCodes:
    """Open the selector's hash functions; raises InputError where there is none."""
    if setting.selector is None:
        raise InputError(f"method '{name}' needs trained hash functions; add --selector FOLDER")
    selector, selection = setting.selector, setting.selection
    args = name, rule_of(selection), selection.dense_layers
    if not selector.shorter:
        return HashCodes(*args, jax.tree.map(jnp.asarray, selector.params))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *selector.sets)
    return HashCodes(*args, params, shorter=tuple(most for most, _ in selector.shorter))
