"""What a layer attends with in an evaluation, for many queries at once or for one, and what its queries read."""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eval.methods.base import Method, Selection
from spotlight_jax.attention import Finish, causal_attention, selected_attention
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.moments import moment_bytes, with_newest
from spotlight_jax.selector.selection import budget_of
from spotlight_jax.tail import TailParams, attend_by_logits

KeysValues = tuple[
    Float[Array, "batch capacity kv_heads head_dim"],
    Float[Array, "batch capacity kv_heads head_dim"],
]

PerQuery = Float[Array, "*queries"] | Float[np.ndarray, "*queries"]


def causal_budgets(length: int, cfg: SelectionConfig, whole_length: bool = False) -> Int32[Array, " length"]:
    """Return the number of tokens that the query at each position may read.

    Args:
        cfg: its share or fixed number, and its least.
        whole_length: the paper's evaluation: every query has the budget of the whole sequence, so that the first ones
            are dense. Otherwise a budget comes from the tokens that a decoding step at that position would have cached.
    """
    ends = jnp.arange(1, length + 1, dtype=jnp.int32)
    return jnp.minimum(budget_of(jnp.full_like(ends, length) if whole_length else ends, cfg), ends)


@flax.struct.dataclass
class Traffic:
    """What queries read from memory, one number a query."""

    tokens: PerQuery  # of each selecting head, their mean
    bytes: PerQuery  # of keys and values, all heads; each selecting head fetches its own
    index_bytes: PerQuery  # of what a method remembers of the keys, all heads
    estimated: PerQuery  # share of the attention that was estimated, not read, mean over query heads


def row_bytes(head_dim: int, dtype: jnp.dtype) -> int:
    """Return the bytes of one token's key and value of one KV head."""
    return 2 * head_dim * jnp.dtype(dtype).itemsize


def dense_traffic(positions: Int32[Array, "batch q_len"], kv_heads: int, bytes_of_row: int) -> Traffic:
    """Return the traffic of queries that read everything."""
    tokens = (positions + 1).astype(jnp.float32)
    return Traffic(tokens, tokens * (kv_heads * bytes_of_row), jnp.zeros_like(tokens), jnp.zeros_like(tokens))


def read_with_tail(
    selection: Selection,
    tail: TailParams | None,
    positions: Int32[Array, "batch q_len"],
    keys: Float[Array, "batch kv_len kv_heads head_dim"],
) -> Selection:
    """Return what queries read that select this: with a tail, the newest tokens and the moments as well."""
    if tail is None:
        return selection
    moved = moment_bytes(keys.shape[2], keys.shape[3], keys.dtype)
    mask = with_newest(selection.mask, positions)
    return dataclasses.replace(selection, mask=mask, index_bytes=selection.index_bytes + float(moved))


def finish_of(tail: TailParams | None) -> Finish | None:
    """Return what makes the outputs, for `selected_attention`."""
    return None if tail is None else functools.partial(attend_by_logits, params=tail)


def selected_traffic(selection: Selection, keys: Float[Array, "batch kv_len kv_heads head_dim"]) -> Traffic:
    """Return the traffic of queries that read a selection and estimate nothing."""
    counts = jnp.sum(selection.mask, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    moved = jnp.sum(counts, axis=-1) * row_bytes(keys.shape[3], keys.dtype)
    return Traffic(jnp.mean(counts, axis=-1), moved, selection.index_bytes, jnp.zeros_like(moved))


def sum_traffic(layers: Sequence[Traffic | None], dense: Traffic) -> Traffic:
    """Return the traffic of a whole model: bytes of all layers; tokens and estimates as means over the sparse ones.

    Args:
        layers: the traffic of each layer, None for one that reads everything.
        dense: the traffic of such a layer.
    """
    sparse = [layer for layer in layers if layer is not None]
    none = jnp.zeros_like(dense.tokens)
    return Traffic(
        tokens=sum((layer.tokens for layer in sparse), none) / len(sparse) if sparse else dense.tokens,
        bytes=sum(((layer or dense).bytes for layer in layers), jnp.zeros_like(dense.bytes)),
        index_bytes=sum((layer.index_bytes for layer in sparse), dense.index_bytes),
        estimated=sum((layer.estimated for layer in sparse), none) / max(len(sparse), 1),
    )


@flax.struct.dataclass
class Selected:
    """Attention in which each query reads what a decoding step at its position would select."""

    method: Method  # with the layer's params
    budgets: Int32[Array, " kv_len"]  # by position, see `causal_budgets`
    positions: Int32[Array, "batch q_len"]  # of the queries among the keys
    lengths: Int32[Array, "batch"]  # tokens there are; the index is made of all of them at once
    dense_prefix: Int32[Array, ""] | int = 0  # queries at positions below it read everything
    chunk: int = flax.struct.field(pytree_node=False, default=64)  # queries at once

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, Traffic]:
        """See `Attend`; slots of the keys and values from `lengths` on hold nothing."""
        index = self.method.index(keys, self.lengths)
        slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
        tail = self.method.tail_params(index)

        def select(rows: Array, at: Array) -> tuple[Array, Array | None, Traffic]:
            selection = self.method.select(rows, keys, index, at, jnp.take(self.budgets, at, mode="clip"))
            selection = read_with_tail(selection, tail, at, keys)
            is_dense = at < self.dense_prefix
            dense = dense_traffic(at, keys.shape[2], row_bytes(keys.shape[3], keys.dtype))
            traffic = jax.tree.map(lambda *two: jnp.where(is_dense, *two), dense, selected_traffic(selection, keys))
            visible = (slots[None, None, :] <= at[:, :, None])[:, :, None, :]
            is_dense = is_dense[:, :, None, None]
            log_weights = selection.log_weights
            if log_weights is not None:
                log_weights = jnp.where(is_dense, 0.0, log_weights)
            return jnp.where(is_dense, visible, selection.mask), log_weights, traffic

        outputs, found = selected_attention(
            queries, keys, values, select, positions=self.positions, chunk=self.chunk, finish=finish_of(tail)
        )
        if tail is None:
            return outputs, found
        traffic, share = found
        return outputs, traffic.replace(estimated=share)


@flax.struct.dataclass
class Prefill:
    """Dense attention that gives back keys and values, padded to a capacity."""

    capacity: int = flax.struct.field(pytree_node=False)

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, KeysValues]:
        """See `Attend`."""
        missing = ((0, 0), (0, self.capacity - keys.shape[1]), (0, 0), (0, 0))
        return causal_attention(queries, keys, values), (jnp.pad(keys, missing), jnp.pad(values, missing))


@flax.struct.dataclass
class Continued:
    """Attention of the tokens after a context: written behind its keys and values first, then read."""

    cached: KeysValues
    start: Int32[Array, ""]
    selected: Selected | None  # None: a layer that reads everything

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, tuple[KeysValues, Traffic | None]]:
        """See `Attend`; gives back the keys and values with the new ones, and the traffic of a sparse layer."""
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, self.start, axis=1)
            for old, new in zip(self.cached, (keys, values), strict=True)
        )
        if self.selected is None:
            return causal_attention(queries, keys, values, offsets=self.start[None]), ((keys, values), None)
        outputs, traffic = self.selected(queries, keys, values)
        return outputs, ((keys, values), traffic)


def default_chunk(q_heads: int, kv_len: int, scores_mib: int | None = None) -> int:
    """Return the number of queries to score at once: as many as have their float32 scores in `scores_mib`, 8 to 512.

    None: 32 MiB on a CPU, which has small caches; 256 MiB on a GPU, which needs large pieces to be busy.
    """
    if scores_mib is None:
        scores_mib = 32 if jax.default_backend() == "cpu" else 256
    return int(min(512, max(8, scores_mib * 2**20 // (4 * q_heads * kv_len))))
