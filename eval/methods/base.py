"""What every method is: it remembers something of the keys, and selects the cached tokens that a query reads.

A method is a pytree. Its arrays lead with a layer axis and everything else is static, so that one compiled layer serves
all layers of a method, and all budgets, which come as numbers.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree, Shaped

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.selection import select_mask
from spotlight_jax.tail import TailParams

Queries = Shaped[Array, "batch n q_heads head_dim"]
Keys = Shaped[Array, "batch kv_len kv_heads head_dim"]
Positions = Int32[Array, "batch n"]  # of the queries among the keys
Budgets = Int32[Array, "batch n"]  # tokens that each query may read


@dataclasses.dataclass(frozen=True)
class Setting:
    """What methods are opened with; each takes what it needs."""

    selection: SelectionConfig
    shape: HeadShape
    selector: Selector | None = None
    seed: int = 0


@flax.struct.dataclass
class Selection:
    """The cached tokens that some queries read in one layer."""

    mask: Bool[Array, "batch n heads kv_len"]  # heads: the query heads, or the KV heads where a group reads one set
    index_bytes: Float[Array, "batch n"]  # read of the index to find that out, all heads together
    log_weights: Float[Array, "batch n heads kv_len"] | None = None  # added to the logits of what is read


@flax.struct.dataclass
class Method:
    """Base of all methods; alone it is `dense`, with which every layer reads everything."""

    name: str = flax.struct.field(pytree_node=False)
    selection: SelectionConfig = flax.struct.field(pytree_node=False)  # sinks, recent and per; budgets come as numbers
    dense_layers: tuple[int, ...] = flax.struct.field(pytree_node=False)  # layers it reads densely
    params: Any = None  # arrays that lead with a layer axis, or without it after `layer`
    tail: TailParams | None = None  # what is not read is estimated with these; as `params`

    def layer(self, layer: int) -> "Method":
        """Return the same method with one layer's params."""
        params, tail = jax.tree.map(lambda leaf: leaf[layer], (self.params, self.tail))
        return self.replace(params=params, tail=tail)  # type: ignore[attr-defined]

    def tail_params(self, index: PyTree) -> TailParams | None:
        """Return the corrections of the estimate of what is not read, None where nothing is estimated."""
        return self.tail

    def index(self, keys: Keys, lengths: Int32[Array, "batch"]) -> PyTree:
        """Return what is remembered of one layer's keys; slots from `lengths` on hold nothing."""
        return None

    def select(self, queries: Queries, keys: Keys, index: PyTree, positions: Positions, budgets: Budgets) -> Selection:
        """Return what each query reads of the keys up to its own, itself included."""
        raise NotImplementedError(f"{self.name} reads every layer densely")


@flax.struct.dataclass
class ScoreMethod(Method):
    """Methods that score every token and read those with the highest scores."""

    def scores(
        self, queries: Queries, keys: Keys, index: PyTree, positions: Positions
    ) -> Shaped[Array, "batch n heads kv_len"]:
        """Return a score for each token, higher ones first; a token that a query may not see may have any."""
        raise NotImplementedError

    def score_range(self, queries: Queries, keys: Keys) -> tuple[int, int] | None:
        """Return the least and greatest score where scores are integers."""
        return None

    def index_bytes(self, keys: Keys, index: PyTree) -> int:
        """Return the bytes of the index that one query reads for each token, all heads together."""
        return 0

    def select(self, queries: Queries, keys: Keys, index: PyTree, positions: Positions, budgets: Budgets) -> Selection:
        """Select the highest scores within the budget, newest first among equals; sinks and recent tokens always."""
        scores = self.scores(queries, keys, index, positions)
        mask = select_mask(scores, positions, self.selection, self.score_range(queries, keys), budgets)
        return Selection(mask=mask, index_bytes=(positions + 1) * jnp.float32(self.index_bytes(keys, index)))

    @property
    def per_kv_head(self) -> bool:
        """Whether the query heads of a group read one set."""
        return self.selection.per == "kv_head"


def selecting_heads(queries: Queries, keys: Keys, selection: SelectionConfig) -> int:
    """Return how many heads choose for themselves."""
    return keys.shape[2] if selection.per == "kv_head" else queries.shape[2]


def key_moments(
    keys: Keys, lengths: Int32[Array, "batch"]
) -> tuple[Float[Array, "kv_heads head_dim"], Float[Array, "kv_heads head_dim"]]:
    """Return the mean and standard deviation of the keys that are there, over all sequences."""
    is_there = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    weights = (is_there / jnp.sum(is_there))[:, :, None, None]
    wide = jnp.where(is_there[:, :, None, None], keys.astype(jnp.float32), 0.0)
    mean = jnp.sum(wide * weights, axis=(0, 1))
    square = jnp.sum(jnp.square(wide - mean[None, None]) * weights, axis=(0, 1))
    return mean, jnp.sqrt(jnp.maximum(square, 1e-12))


def rule_of(selection: SelectionConfig, **changes: Any) -> SelectionConfig:
    """Return a selection without its share: methods that differ only in that share their compiled programs."""
    return dataclasses.replace(selection, keep=1.0, budget=None, min_tokens=0, dense_layers=(), **changes)
