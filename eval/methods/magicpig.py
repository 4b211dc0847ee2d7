"""MagicPIG (arXiv 2410.16179): keys drawn by hash collisions, and weighed by how probable it was to draw them."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int16, Int32, PyTree

from eval.methods.base import Budgets, Keys, Method, Positions, Queries, Selection, Setting, key_moments, rule_of

BITS, TABLES = 10, 150  # K and L as published
COLLISIONS = 2  # tables that must agree
SINKS, RECENT = 4, 64  # read in any case, as published
DENSE_LAYERS = (0, 16)  # as published
_ID_BYTES = 4  # of a key's number in a bucket
_TABLES_AT_ONCE = 10


@flax.struct.dataclass
class MagicPig(Method):
    """SimHash tables of centred keys; `params` are the planes `[head_dim, tables * bits]`, common to all heads.

    A query head reads the keys that share a bucket with it in at least two tables. With p = 1 - angle / pi the
    probability of one equal bit, that of being read is u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1), and the estimate
    of attention is the softmax of q . k / sqrt(d) - log u over what is read. How much is read is left to chance, so the
    budget is not looked at. Keys are centred at the mean of the sequence's keys: adding a constant to all keys does not
    change a softmax.
    """

    bits: int = flax.struct.field(pytree_node=False, default=BITS)
    tables: int = flax.struct.field(pytree_node=False, default=TABLES)

    def index(
        self, keys: Keys, lengths: Int32[Array, "batch"]
    ) -> tuple[Float[Array, "kv_heads head_dim"], Int16[Array, "tables batch kv_heads kv_len"]]:
        """Return the keys' mean, and the bucket of each key in each table."""
        mean, _ = key_moments(keys, lengths)
        return mean, self.buckets(keys.astype(jnp.float32) - mean[None, None])

    def buckets(self, x: Float[Array, "batch n heads head_dim"]) -> Int16[Array, "tables batch heads n"]:
        """Return the bucket of each key in each table: K signs make a number below 2^K."""
        signs = jnp.einsum("bnhd,dc->bnhc", x, self.params, precision="highest") > 0
        signs = signs.reshape(*x.shape[:3], self.tables, self.bits).astype(jnp.int16)
        powers = jnp.int16(2) ** jnp.arange(self.bits, dtype=jnp.int16)
        return jnp.sum(signs * powers.reshape(1, 1, 1, 1, -1), axis=-1, dtype=jnp.int16).transpose(3, 0, 2, 1)

    def collisions(
        self, queries: Queries, buckets: Int16[Array, "tables batch kv_heads kv_len"]
    ) -> Int32[Array, "batch n q_heads kv_len"]:
        """Count the tables in which each key shares the query's bucket, a few tables at once to save memory."""
        batch, n, q_heads, _ = queries.shape
        kv_heads, kv_len = buckets.shape[2:]
        of_queries = self.buckets(queries.astype(jnp.float32)).transpose(0, 1, 3, 2)
        of_queries = of_queries.reshape(self.tables, batch, n, kv_heads, q_heads // kv_heads)
        at_once = _TABLES_AT_ONCE if self.tables % _TABLES_AT_ONCE == 0 else 1

        def count(counts: Array, some: tuple[Array, ...]) -> tuple[Array, None]:
            for mine, theirs in zip(*some, strict=True):
                equal = mine[..., None] == theirs[:, None, :, None, :]
                counts = counts + equal.astype(counts.dtype)
            return counts, None

        start = jnp.zeros((batch, n, kv_heads, q_heads // kv_heads, kv_len), jnp.uint8)
        pieces = tuple(x.reshape(-1, at_once, *x.shape[1:]) for x in (of_queries, buckets))
        counts, _ = jax.lax.scan(count, start, pieces)
        return counts.astype(jnp.int32).reshape(batch, n, q_heads, kv_len)

    def log_probability(
        self, queries: Queries, keys: Keys, mean: Float[Array, "kv_heads head_dim"]
    ) -> Float[Array, "batch n q_heads kv_len"]:
        """Return log u of each query head and key."""
        centred = keys.astype(jnp.float32) - mean[None, None]
        centred = centred / jnp.maximum(jnp.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
        wide = queries.astype(jnp.float32)
        wide = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
        grouped = wide.reshape(*wide.shape[:2], keys.shape[2], -1, wide.shape[-1])
        cosine = jnp.einsum("btkgd,bskd->btkgs", grouped, centred, precision="highest")
        cosine = cosine.reshape(*wide.shape[:3], -1)
        equal_bit = 1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi
        in_table = jnp.clip(equal_bit**self.bits, 1e-9, 1 - 1e-6)
        missed = jnp.log1p(-in_table)
        none = jnp.exp(self.tables * missed)
        one = self.tables * in_table * jnp.exp((self.tables - 1) * missed)
        # where a collision is rare, the difference of nearly equal numbers: its leading term instead
        rare = self.tables * (self.tables - 1) / 2 * jnp.square(in_table)
        return jnp.log(jnp.where(self.tables * in_table < 1e-2, rare, 1 - none - one))

    def select(self, queries: Queries, keys: Keys, index: PyTree, positions: Positions, budgets: Budgets) -> Selection:
        """Select what collided, with its weight; sinks and recent tokens always, with weight 1."""
        mean, buckets = index
        slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None, :]
        ends = positions[:, :, None] + 1
        always = ((slots < SINKS) | (slots >= ends - RECENT))[:, :, None]
        visible = (slots < ends)[:, :, None]
        counts = jnp.where(visible & ~always, self.collisions(queries, buckets), 0)
        drawn = counts >= COLLISIONS
        log_weights = jnp.where(drawn, -self.log_probability(queries, keys, mean), 0.0)
        mask = drawn | jnp.broadcast_to(always & visible, drawn.shape)
        read = jnp.sum(counts, axis=(2, 3)).astype(jnp.float32) * _ID_BYTES
        return Selection(mask=mask, index_bytes=read, log_weights=log_weights)


def open_magicpig(name: str, setting: Setting) -> MagicPig:
    """Open MagicPIG with K = 10, L = 150, layers 0 and 16 dense."""
    shape = setting.shape
    size = (shape.layers, shape.head_dim, TABLES * BITS)
    planes = jax.random.normal(jax.random.key(setting.seed), size, jnp.float32)
    return MagicPig(name, rule_of(setting.selection), DENSE_LAYERS, planes)
