"""Attention of one layer as a method reads it, for many queries at once or for one."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from eval.methods.base import Method, Reading
from spotlight_jax.attention import selected_attention
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.selector.selection import budget_of


def causal_budgets(length: int, cfg: SelectionConfig, whole_length: bool = False) -> Int32[Array, " length"]:
    """Tokens that the query at each position may read.

    Args:
        cfg: its share or fixed number, and its least.
        whole_length: the paper's evaluation: every query has the budget of the whole sequence, so that the first ones
            are dense. Otherwise a budget comes from the tokens that a decoding step at that position would have cached.
    """
    ends = jnp.arange(1, length + 1, dtype=jnp.int32)
    return jnp.minimum(budget_of(jnp.full_like(ends, length) if whole_length else ends, cfg), ends)


def row_bytes(keys: Float[Array, "batch kv_len kv_heads head_dim"]) -> int:
    """Bytes of one token's key and value of one KV head."""
    return 2 * keys.shape[3] * keys.dtype.itemsize


def dense_reads(
    positions: Int32[Array, "batch q_len"], kv_heads: int, bytes_of_row: int
) -> dict[str, Float[Array, "batch q_len"]]:
    """What `attend_with` says of its reads, for a layer that reads everything."""
    tokens = (positions + 1).astype(jnp.float32)
    return {"tokens": tokens, "bytes": tokens * (kv_heads * bytes_of_row), "index_bytes": jnp.zeros_like(tokens)}


def sparse_reads(
    reading: Reading, keys: Float[Array, "batch kv_len kv_heads head_dim"]
) -> dict[str, Float[Array, "batch q_len"]]:
    """What each query read: `tokens` per selecting head (their mean), `bytes` of keys and values of all heads (each
    selecting head fetches its own), `index_bytes`."""
    counts = jnp.sum(reading.mask, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    return {
        "tokens": jnp.mean(counts, axis=-1),
        "bytes": jnp.sum(counts, axis=-1) * row_bytes(keys),
        "index_bytes": reading.index_bytes,
    }


def attend_with(
    method: Method,
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch kv_len kv_heads head_dim"],
    values: Float[Array, "batch kv_len kv_heads head_dim"],
    budgets: Int32[Array, " kv_len"],
    positions: Int32[Array, "batch q_len"],
    lengths: Int32[Array, "batch"],
    dense_prefix: Int32[Array, ""] | int = 0,
    chunk: int = 64,
) -> tuple[Float[Array, "batch q_len q_heads head_dim"], dict[str, Float[Array, "batch q_len"]]]:
    """Each query reads what a decoding step at its position would select.

    Args:
        method: with this layer's params.
        queries: after RoPE, as the keys.
        keys: slots from `lengths` on hold nothing.
        values: of the same tokens as the keys.
        budgets: by position, see `causal_budgets`.
        positions: of the queries among the keys.
        lengths: tokens there are; the index is made of all of them at once.
        dense_prefix: queries at positions below it read everything.
        chunk: queries at once.

    Returns: the outputs, and `sparse_reads`.
    """
    index = method.index(keys, lengths)
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)

    def select(rows: Array, at: Array) -> tuple[Array, Array | None, dict[str, Array]]:
        reading = method.select(rows, keys, index, at, jnp.take(budgets, at, mode="clip"))
        reads = sparse_reads(reading, keys)
        is_dense = at < dense_prefix
        whole = dense_reads(at, keys.shape[2], row_bytes(keys))
        reads = {name: jnp.where(is_dense, whole[name], reads[name]) for name in reads}
        visible = (places[None, None, :] <= at[:, :, None])[:, :, None, :]
        is_dense = is_dense[:, :, None, None]
        log_weights = reading.log_weights
        if log_weights is not None:
            log_weights = jnp.where(is_dense, 0.0, log_weights)
        return jnp.where(is_dense, visible, reading.mask), log_weights, reads

    return selected_attention(queries, keys, values, select, positions=positions, chunk=chunk)


@flax.struct.dataclass
class Selected:
    """What a layer attends with that reads as a method does; see `attend_with`."""

    method: Method  # with the layer's params
    budgets: Int32[Array, " kv_len"]
    positions: Int32[Array, "batch q_len"]
    lengths: Int32[Array, "batch"]
    dense_prefix: Int32[Array, ""]
    chunk: int = flax.struct.field(pytree_node=False, default=64)

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, dict[str, Array]]:
        """See `attend_with`."""
        args = self.budgets, self.positions, self.lengths, self.dense_prefix, self.chunk
        return attend_with(self.method, queries, keys, values, *args)


def default_chunk(q_heads: int, kv_len: int, scores_mib: int | None = None) -> int:
    """Queries to score at once: as many as their float32 scores fit into `scores_mib`, from 8 to 512.

    None: 32 MiB on a CPU, whose caches are small; 256 MiB on a GPU, which needs large pieces to be busy.
    """
    if scores_mib is None:
        scores_mib = 32 if jax.default_backend() == "cpu" else 256
    return int(min(512, max(8, scores_mib * 2**20 // (4 * q_heads * kv_len))))
