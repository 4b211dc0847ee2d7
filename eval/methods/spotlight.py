"""Spotlight: the learned hash functions of a selector. Other methods that score codes are built from the same class."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree, UInt32

from eval.methods.base import Keys, Positions, Queries, ScoreMethod, Setting, key_moments, rule_of
from spotlight_jax import hashing
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.errors import InputError
from spotlight_jax.scoring import hash_score_range, hash_scores


@flax.struct.dataclass
class HashCodes(ScoreMethod):
    """Packed codes of the keys, scored as decoding does; `params` are `hashing.HashParams`."""

    cfg: HashConfig = flax.struct.field(pytree_node=False, default_factory=HashConfig)
    # where keys are taken to lie: as measured in training, or as this sequence's own keys do
    stats: Literal["trained", "own mean", "own mean and spread"] = flax.struct.field(
        pytree_node=False, default="trained"
    )

    def index(
        self, keys: Keys, lengths: Int32[Array, "batch"]
    ) -> tuple[hashing.KeyStats | hashing.Coder, UInt32[Array, "batch code_heads words kv_len"]]:
        """Where the keys lie, and their codes."""
        stats = self.params.stats
        if self.stats != "trained":
            mean, spread = key_moments(keys, lengths)
            scale = spread if self.stats == "own mean and spread" else jnp.ones_like(spread)
            stats = hashing.KeyStats(mean=mean, scale=scale)
        return stats, hashing.key_codes(self.params.replace(stats=stats), keys, self.cfg)

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Int32[Array, "batch n heads kv_len"]:
        """See `scoring.hash_scores`."""
        stats, codes = index
        return hash_scores(self.params.replace(stats=stats), queries, codes, self.cfg, self.per_kv_head)

    def score_range(self, queries: Queries, keys: Keys) -> tuple[int, int]:
        """See `scoring.hash_score_range`."""
        return hash_score_range(self.cfg, queries.shape[2] // keys.shape[2], self.per_kv_head)

    def index_bytes(self, keys: Keys, index: PyTree) -> int:
        """All words of a token's codes."""
        codes = index[1]
        return codes.shape[1] * codes.shape[2] * codes.dtype.itemsize


def open_spotlight(name: str, setting: Setting) -> HashCodes:
    """The selector's hash functions; raises InputError where there is none."""
    if setting.selector is None:
        raise InputError(f"method '{name}' needs trained hash functions; add --selector FOLDER")
    params = jax.tree.map(jnp.asarray, setting.selector.params)
    selection = setting.selection
    return HashCodes(name, rule_of(selection), selection.dense_layers, params, cfg=setting.selector.cfg)
