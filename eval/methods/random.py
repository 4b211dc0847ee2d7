"""Random: tokens drawn by lot, to see how far from it a method is."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree

from eval.methods.base import Keys, Positions, Queries, ScoreMethod, Setting, rule_of, selecting_heads

_LAST = 2**16 - 1


@flax.struct.dataclass
class Random(ScoreMethod):
    """A new draw for each layer, head and position; all sequences of a batch share it."""

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Int32[Array, "batch n heads kv_len"]:
        """Draw uniform 16-bit numbers; `params` are a layer's random bits."""
        base = jax.random.wrap_key_data(self.params)
        shape = (selecting_heads(queries, keys, self.selection), keys.shape[1])

        def draw(position: Array) -> Array:
            return jax.random.bits(jax.random.fold_in(base, position), shape, jnp.uint16)

        return jax.vmap(jax.vmap(draw))(positions).astype(jnp.int32)

    def score_range(self, queries: Queries, keys: Keys) -> tuple[int, int]:
        """Return the range of 16-bit numbers."""
        return 0, _LAST


def open_random(name: str, setting: Setting) -> Random:
    """Open the method with one random key a layer."""
    layer_keys = jax.random.key_data(jax.random.split(jax.random.key(setting.seed), setting.shape.layers))
    return Random(name, rule_of(setting.selection), setting.selection.dense_layers, layer_keys)
