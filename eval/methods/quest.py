"""Quest (arXiv 2406.10774): whole pages of the cache, by an upper bound of the query's score in each."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from eval.methods.base import Budgets, Keys, Method, Positions, Queries, Selection, Setting, rule_of
from spotlight_jax.kernels.select_top import mask_top
from spotlight_jax.selector.selection import ordered_ranks

PAGE = 16  # tokens, as published
DENSE_LAYERS = (0, 1)  # as published
_FIRST, _SINK, _RECENT = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD  # ranks that no bound has


@flax.struct.dataclass
class Quest(Method):
    """Each page keeps the least and the greatest of its keys in every dimension.

    A query reads the pages of the highest sum_d max(q_d min_d, q_d max_d), summed over a group where it reads one set,
    as many as fit into its budget. Its newest page, with bounds that may still change, is always read and counts as
    full as it is; sinks and recent tokens bring their whole pages, which come before all others.
    """

    def index(
        self, keys: Keys, lengths: Int32[Array, "batch"]
    ) -> tuple[Shaped[Array, "batch pages kv_heads head_dim"], Shaped[Array, "batch pages kv_heads head_dim"]]:
        """Return the least and greatest key of each page; only pages before that of the query are asked for."""
        missing = -keys.shape[1] % PAGE
        padded = jnp.pad(keys, ((0, 0), (0, missing), (0, 0), (0, 0)), mode="edge")
        pages = padded.reshape(keys.shape[0], -1, PAGE, *keys.shape[2:])
        return jnp.min(pages, axis=2), jnp.max(pages, axis=2)

    def bounds(self, queries: Queries, index: PyTree) -> Float[Array, "batch n heads pages"]:
        """Return the greatest score that a key of each page can have: q+ . max + q- . min."""
        least, greatest = (x.astype(jnp.float32) for x in index)
        kv_heads = least.shape[2]
        grouped = queries.astype(jnp.float32).reshape(*queries.shape[:2], kv_heads, -1, queries.shape[-1])
        up, down = jnp.maximum(grouped, 0), jnp.minimum(grouped, 0)
        if self.selection.per == "kv_head":
            up, down = up.sum(3, keepdims=True), down.sum(3, keepdims=True)
        product = "btkgd,bpkd->btkgp"
        bounds = jnp.einsum(product, up, greatest, precision="highest") + jnp.einsum(
            product, down, least, precision="highest"
        )
        return bounds.reshape(*bounds.shape[:2], -1, bounds.shape[-1])

    def select(self, queries: Queries, keys: Keys, index: PyTree, positions: Positions, budgets: Budgets) -> Selection:
        """Select whole pages within the budget."""
        bounds = self.bounds(queries, index)
        pages = jnp.arange(bounds.shape[-1], dtype=jnp.int32)[None, None, None, :]
        current = (positions // PAGE)[:, :, None, None]
        oldest_recent = (jnp.maximum(positions + 1 - self.selection.recent_tokens, 0) // PAGE)[:, :, None, None]
        sinks = -(-self.selection.sink_tokens // PAGE)
        ranks = ordered_ranks(bounds)
        ranks = jnp.where(pages >= oldest_recent, jnp.uint32(_RECENT), ranks)
        ranks = jnp.where(pages < sinks, jnp.uint32(_SINK), ranks)
        ranks = jnp.where(pages == current, jnp.uint32(_FIRST), ranks)
        ranks = jnp.where(pages > current, jnp.uint32(0), ranks)
        own_tokens = positions % PAGE + 1
        fitting = 1 + jnp.maximum(budgets - own_tokens, 0) // PAGE
        chosen = mask_top(ranks, jnp.broadcast_to(fitting[:, :, None], ranks.shape[:3]))
        mask = jnp.repeat(chosen, PAGE, axis=-1)[..., : keys.shape[1]]
        slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None, None, :]
        mask = mask & (slots <= positions[:, :, None, None])
        page_bytes = 2 * keys.shape[2] * keys.shape[3] * keys.dtype.itemsize
        read = (positions // PAGE + 1) * jnp.float32(page_bytes)
        return Selection(mask=mask, index_bytes=read)


def open_quest(name: str, setting: Setting) -> Quest:
    """Open Quest with pages of 16 tokens, layers 0 and 1 dense."""
    return Quest(name, rule_of(setting.selection), DENSE_LAYERS)
