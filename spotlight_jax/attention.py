"""Causal attention of one layer: dense, over new tokens or over a cache; selected, of many queries at once.

Scores are never held for all heads and all queries at once: the XLA form walks over KV heads and over chunks of
queries, and skips the keys that lie after a chunk.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree, Shaped

Implementation = Literal["auto", "xla", "cudnn"]
# (queries, their positions) -> (mask of what each reads, logarithms of weights or None, anything the caller wants back)
Select = Callable[[Array, Array], tuple[Array, Array | None, PyTree]]
# (logits, mask [batch, kv_heads, group, q_len, kv_len], values, positions) -> outputs, head_dim in kv_len's place, and
# the share of each one's attention that is an estimate
Finish = Callable[[Array, Array, Array, Array], tuple[Array, Array]]

_SEGMENTS = 16  # unrolled pieces with a key prefix of their own; more would only cost compile time
_ROWS_AT_ONCE = 16  # up to this many queries all heads are scored in one product (decoding)
_MASKED = -1e30  # not -inf: a padded row without any key must stay finite


def causal_attention(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch kv_len kv_heads head_dim"],
    values: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    offsets: Int32[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
    chunk: int = 256,
) -> Float[Array, "batch q_len q_heads head_dim"]:
    """Return attention of query `i` to keys `0 .. offset + i`; query head `h` reads KV head `h // group`.

    Args:
        queries: after RoPE, as the keys.
        keys: may be a cache with unfilled slots at the end; slots after a query's own position are never read.
        values: of the same tokens as the keys.
        offsets: position of each sequence's first query among the keys (prefill: 0; decoding: tokens cached before).
            None: the queries are the last `q_len` keys. That case is static, so masked key blocks are skipped.
        scale: of the scores; None means `head_dim ** -0.5`.
        implementation: "xla" runs anywhere; "cudnn" needs an NVIDIA GPU, bfloat16 or float16, a head_dim that is a
            multiple of 8 and at most 128, and either as many queries as keys without offsets, or one query; "auto"
            takes cuDNN where it can.
        chunk: queries scored at once by "xla". The largest buffer is `group * chunk * kv_len` float32 numbers.

    Raises:
        ValueError: shapes that do not fit together, or a named implementation that cannot run this case.
    """
    _check_shapes(queries, keys, values)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    obstacle = _cudnn_obstacle(queries, keys, offsets)
    if implementation == "auto":
        implementation = "xla" if obstacle else "cudnn"
    if implementation == "cudnn":
        if obstacle:
            raise ValueError(f"implementation='cudnn' cannot run here: {obstacle}")
        return _cudnn_attention(queries, keys, values, offsets, scale)
    if implementation != "xla":
        raise ValueError(f"implementation is one of 'auto', 'xla', 'cudnn'; got {implementation!r}")
    if queries.shape[1] <= _ROWS_AT_ONCE:
        return _small_attention(queries, keys, values, offsets, scale)
    return _chunked_attention(queries, keys, values, offsets, scale, chunk)


def _check_shapes(queries: Array, keys: Array, values: Array) -> None:
    """Raise ValueError naming both shapes when they cannot attend to each other."""
    if keys.shape != values.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape} differ in shape")
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"queries {queries.shape} and keys {keys.shape} differ in batch or head_dim")
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(f"{queries.shape[2]} query heads are not a multiple of {keys.shape[2]} KV heads")
    if queries.shape[1] > keys.shape[1]:
        raise ValueError(f"{queries.shape[1]} queries but only {keys.shape[1]} keys")


def _cudnn_obstacle(queries: Array, keys: Array, offsets: Array | None) -> str | None:
    """Return why cuDNN's fused attention cannot take this case, or None when it can."""
    if jax.default_backend() != "gpu":
        return f"the default device is {jax.default_backend()}, not an NVIDIA GPU"
    if queries.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != queries.dtype:
        return f"queries are {queries.dtype} and keys {keys.dtype}, not both bfloat16 or float16"
    if queries.shape[-1] % 8 or queries.shape[-1] > 128:
        return f"head_dim {queries.shape[-1]} is not a multiple of 8 up to 128"
    square = offsets is None and queries.shape[1] == keys.shape[1]
    if not square and queries.shape[1] != 1:
        return "its causal mask fits only as many queries as keys without offsets, or a single query"
    return None


def _cudnn_attention(queries: Array, keys: Array, values: Array, offsets: Array | None, scale: float) -> Array:
    """Return fused attention; a single query is not causal but bounded by the filled length of its cache."""
    if queries.shape[1] > 1:
        return jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")
    filled = None if offsets is None else offsets + 1
    return jax.nn.dot_product_attention(
        queries, keys, values, scale=scale, key_value_seq_lengths=filled, implementation="cudnn"
    )


def _softmax_values(
    scores: Float[Array, "*rows kv_len"],
    visible: Bool[Array, "*rows kv_len"],
    values: Array,
    product: str,
) -> Array:
    """Apply a masked softmax over the last axis, in float32, to values by `einsum(product, weights, values)`."""
    scores = jnp.where(visible, scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    outputs = jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return outputs / weights.sum(axis=-1, keepdims=True)


def _small_attention(queries: Array, keys: Array, values: Array, offsets: Array | None, scale: float) -> Array:
    """Attend with all heads in one product, for a few queries."""
    batch, q_len, q_heads, head_dim = queries.shape
    kv_len, kv_heads = keys.shape[1:3]
    grouped = queries.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * scale
    if offsets is None:
        offsets = jnp.full((batch,), kv_len - q_len, jnp.int32)
    rows = offsets[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None, :]
    visible = jnp.arange(kv_len, dtype=jnp.int32)[None, None, :] <= rows[:, :, None]
    visible = jnp.broadcast_to(visible[:, None, None, :, :], scores.shape)
    outputs = _softmax_values(scores, visible, values, "bkgts,bskd->bkgtd")
    return outputs.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype)


def _chunked_attention(
    queries: Array, keys: Array, values: Array, offsets: Array | None, scale: float, chunk: int
) -> Array:
    """Attend with one KV head and one chunk of queries at a time.

    Queries are padded to whole chunks and cut into at most `_SEGMENTS` segments; without offsets a segment is given
    only the keys up to its last query, which halves the work.
    """
    batch, q_len = queries.shape[:2]
    kv_len = keys.shape[1]
    chunks = -(-q_len // chunk)
    per_segment = -(-chunks // _SEGMENTS) * chunk
    first = jnp.full((batch,), kv_len - q_len, jnp.int32) if offsets is None else offsets

    outputs = []
    for start in range(0, q_len, per_segment):
        stop = min(start + per_segment, q_len)
        prefix = kv_len if offsets is not None else kv_len - q_len + stop
        attend = functools.partial(_attend_segment, scale=scale, chunk=min(chunk, stop - start))
        outputs.append(attend(queries[:, start:stop], keys[:, :prefix], values[:, :prefix], first + start))
    return jnp.concatenate(outputs, axis=1)


def _attend_segment(queries: Array, keys: Array, values: Array, first: Array, *, scale: float, chunk: int) -> Array:
    """Return attention of consecutive queries whose first one sits at position `first[batch]` among the keys."""
    batch, q_len, q_heads, head_dim = queries.shape
    kv_len, kv_heads = keys.shape[1:3]
    group = q_heads // kv_heads
    chunks = -(-q_len // chunk)
    padded = jnp.pad(queries * jnp.asarray(scale, queries.dtype), ((0, 0), (0, chunks * chunk - q_len), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, chunks, chunk, kv_heads, group, head_dim).transpose(0, 3, 1, 4, 2, 5)
    positions = jnp.arange(kv_len, dtype=jnp.int32)

    def attend_head(head: tuple[Array, Array, Array, Array]) -> Array:
        head_queries, head_keys, head_values, head_first = head

        def attend_chunk(piece: tuple[Array, Array]) -> Array:
            chunk_queries, row = piece
            scores = jnp.einsum("gtd,sd->gts", chunk_queries, head_keys, preferred_element_type=jnp.float32)
            rows = head_first + row + jnp.arange(chunk, dtype=jnp.int32)
            visible = jnp.broadcast_to((positions[None, :] <= rows[:, None])[None], scores.shape)
            return _softmax_values(scores, visible, head_values, "gts,sd->gtd").astype(queries.dtype)

        rows = jnp.arange(chunks, dtype=jnp.int32) * chunk
        return jax.lax.map(attend_chunk, (head_queries, rows))

    def flatten(x: Array) -> Array:
        return x.reshape(batch * kv_heads, *x.shape[2:])

    heads = (
        flatten(grouped),
        flatten(keys.transpose(0, 2, 1, 3)),
        flatten(values.transpose(0, 2, 1, 3)),
        jnp.repeat(first, kv_heads),
    )
    outputs = jax.lax.map(attend_head, heads).reshape(batch, kv_heads, chunks, group, chunk, head_dim)
    outputs = outputs.transpose(0, 2, 4, 1, 3, 5).reshape(batch, chunks * chunk, q_heads, head_dim)
    return outputs[:, :q_len]


def grouped_logits(
    queries: Float[Array, "batch q_len q_heads head_dim"], keys: Float[Array, "batch kv_len kv_heads head_dim"]
) -> Float[Array, "batch kv_heads group q_len kv_len"]:
    """Return the scaled float32 logits of all queries with all keys."""
    batch, q_len, _, head_dim = queries.shape
    grouped = queries.reshape(batch, q_len, keys.shape[2], -1, head_dim)
    return jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5


def spread_heads(
    x: Shaped[Array, "batch q_len heads kv_len"], q_heads: int, kv_heads: int
) -> Shaped[Array, "batch kv_heads group q_len kv_len"]:
    """Return what selecting heads have, KV heads or query heads, for each query head in the layout of logits."""
    batch, q_len, heads, kv_len = x.shape
    x = jnp.repeat(x, q_heads // heads, axis=2).reshape(batch, q_len, kv_heads, -1, kv_len)
    return x.transpose(0, 2, 3, 1, 4)


def selected_attention(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch kv_len kv_heads head_dim"],
    values: Float[Array, "batch kv_len kv_heads head_dim"],
    select: Select,
    *,
    positions: Int32[Array, "batch q_len"] | None = None,
    chunk: int = 64,
    finish: Finish | None = None,
) -> tuple[Float[Array, "batch q_len q_heads head_dim"], PyTree]:
    """Return attention in which every query reads what `select` chooses: many steps of decoding, or one, at once.

    Args:
        queries: after RoPE, as the keys.
        keys: may be a cache with unfilled slots at the end, which `select` never chooses.
        values: of the same tokens as the keys.
        select: some of the queries and their positions among the keys `[batch, n]` to a mask
            `[batch, n, heads, kv_len]` with at least one token a row, heads being q_heads or kv_heads; logarithms of
            weights of the same shape that are added to the logits, or None; and anything else with leaves
            `[batch, n, ...]`, which is handed back for all queries.
        positions: None: the queries are the last `q_len` keys.
        chunk: queries at once; the largest buffers are `[batch, chunk, q_heads, kv_len]` float32.
        finish: makes outputs of logits, mask, values and positions; None: a softmax over the mask.

    Returns: outputs, and what `select` handed back; with `finish`, a pair of that and the mean share over the query
    heads `[batch, q_len]` that was estimated.
    """
    _check_shapes(queries, keys, values)
    batch, q_len, q_heads = queries.shape[:3]
    kv_len, kv_heads = keys.shape[1:3]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(kv_len - q_len, kv_len, dtype=jnp.int32)[None, :], (batch, q_len))
    chunk = min(chunk, q_len)
    chunks = -(-q_len // chunk)
    missing = chunks * chunk - q_len  # rows that fill up the last chunk select like the last query, and are cut off

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(padded.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk, *x.shape[3:])[:, :q_len]

    def attend_chunk(piece: tuple[Array, Array]) -> tuple[Array, PyTree]:
        rows, places = piece
        mask, log_weights, aux = select(rows, places)
        logits = grouped_logits(rows, keys)
        spread = functools.partial(spread_heads, q_heads=q_heads, kv_heads=kv_heads)
        if log_weights is not None:
            logits = logits + spread(log_weights)
        if finish is None:
            outputs = _softmax_values(logits, spread(mask), values, "bkgts,bskd->bkgtd")
        else:
            outputs, share = finish(logits, spread(mask), values, places)
            aux = aux, share.mean(axis=(1, 2))
        return outputs.transpose(0, 3, 1, 2, 4).reshape(rows.shape).astype(queries.dtype), aux

    outputs, aux = jax.lax.map(attend_chunk, (split(queries), split(positions)))
    return join(outputs), jax.tree.map(join, aux)
