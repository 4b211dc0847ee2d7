"""Oracles: the tokens that rank highest by the attention itself, which no method can know without reading all keys.

Each is named by what it ranks by. Query heads that read one set can be served in two ways: `oracle-scores` takes the
highest sums of their dot products, `oracle-mass` the highest sums of their attention probabilities, which is the most
that one set of that size can hold. Where each query head chooses for itself (`oracle-query`) both are the same.
"""

import flax.struct
from jaxtyping import Array, Float, PyTree

from eval.methods.base import Keys, Positions, Queries, ScoreMethod, Setting, rule_of
from spotlight_jax.metrics import attention_probabilities
from spotlight_jax.selector.scoring import exact_scores


@flax.struct.dataclass
class Oracle(ScoreMethod):
    """True post-RoPE dot products, summed over a group where it reads one set. Its scores count as free."""

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Float[Array, "batch n heads kv_len"]:
        """See `scoring.exact_scores`."""
        return exact_scores(queries, keys, self.per_kv_head)


@flax.struct.dataclass
class MassOracle(Oracle):
    """Attention probabilities, averaged over a group where it reads one set: no set of that size holds more of them."""

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Float[Array, "batch n heads kv_len"]:
        """See `metrics.attention_probabilities`."""
        heads = keys.shape[2] if self.per_kv_head else queries.shape[2]
        return attention_probabilities(queries, keys, positions, heads)


def open_oracle(name: str, setting: Setting) -> Oracle:
    """Open an oracle; all but `oracle-query` choose per KV head or per query head as the selection says."""
    forced = {"per": "query_head"} if name == "oracle-query" else {}
    selection = rule_of(setting.selection, **forced)
    kind = MassOracle if name == "oracle-mass" else Oracle
    return kind(name, selection, setting.selection.dense_layers)
