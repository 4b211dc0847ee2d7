"""Window: attention sinks and the newest tokens, whatever the query (StreamingLLM, arXiv 2309.17453)."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree

from eval.methods.base import Keys, Positions, Queries, ScoreMethod, Setting, rule_of, selecting_heads

SINKS = 4  # as published


@flax.struct.dataclass
class Window(ScoreMethod):
    """The first four tokens, and as many of the newest as the budget holds."""

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Int32[Array, "batch n heads kv_len"]:
        """Return a token's position; the sinks come first of all."""
        kv_len = keys.shape[1]
        place = jnp.arange(kv_len, dtype=jnp.int32)
        place = jnp.where(place < SINKS, kv_len, place)
        heads = selecting_heads(queries, keys, self.selection)
        return jnp.broadcast_to(place[None, None, None, :], (*queries.shape[:2], heads, kv_len))

    def score_range(self, queries: Queries, keys: Keys) -> tuple[int, int]:
        """Return the range of positions, and one more for the sinks."""
        return 0, keys.shape[1]


def open_window(name: str, setting: Setting) -> Window:
    """Open the method, which needs nothing."""
    return Window(name, rule_of(setting.selection), setting.selection.dense_layers)
