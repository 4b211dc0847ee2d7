"""An evaluation method of your own, added from outside: a class, a function that opens it, the name MODULE:FUNCTION.

    python examples/add_method.py                        two CPU cores: one or two minutes
    PYTHONPATH=examples spotlight eval inspect --methods oracle-scores add_method:open_key_signs

The method here keeps the signs of a key's dimensions, and multiplies them with the whole query.
"""

import flax.struct
import jax.numpy as jnp

from eval.methods.base import ScoreMethod, rule_of
from eval.perplexity import PerplexityConfig
from eval.perplexity.run import main as measure


@flax.struct.dataclass
class KeySigns(ScoreMethod):
    """Tokens by the dot product of the query with the signs of their keys."""

    def index(self, keys, lengths):
        """Return what is remembered of the keys [batch, kv_len, kv_heads, head_dim]: their signs."""
        return jnp.sign(keys).astype(jnp.float32)

    def scores(self, queries, keys, index, positions):
        """Return a score for each token, higher ones first: [batch, q_len, heads, kv_len]."""
        batch, q_len, _, head_dim = queries.shape
        grouped = queries.astype(jnp.float32).reshape(batch, q_len, keys.shape[2], -1, head_dim)
        if self.per_kv_head:  # the query heads that share a KV head read one set, by their sum
            grouped = grouped.sum(axis=3, keepdims=True)
        return jnp.einsum("btkgd,bskd->btkgs", grouped, index).reshape(batch, q_len, -1, keys.shape[1])

    def index_bytes(self, keys, index):
        """Return the bytes of the index that a query reads for each token, all heads together: a bit a dimension."""
        return index.shape[2] * index.shape[3] // 8


def open_key_signs(name, setting):
    """Open the method for a model; `setting` has the selection, the model's heads, the selector and a seed."""
    return KeySigns(name, rule_of(setting.selection), setting.selection.dense_layers)


def main(cfg):
    """Measure and return the rows."""
    return measure(cfg)["results"]


if __name__ == "__main__":
    methods = ("dense", "oracle-scores", "window", "add_method:open_key_signs")
    main(PerplexityConfig(methods=methods, keep=(0.05,), texts=("text:alice",), window=1024, windows_per_text=1))
