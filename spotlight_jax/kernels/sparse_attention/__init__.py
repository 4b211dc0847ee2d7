"""Attention of one new token over selected cache rows, alone or with an estimate of attention to the others."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.sparse_attention.cases import EstimatedAttentionCase
from spotlight_jax.kernels.sparse_attention.gather import estimated_attention_gather, sparse_attention_gather
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    estimated_attention_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.kernels.sparse_attention.reference import estimated_attention_reference, sparse_attention_reference
from spotlight_jax.kernels.trust import is_trusted
from spotlight_jax.moments import Moments
from spotlight_jax.tail import TailParams

__all__ = ["SparseAttentionImpl", "choose_estimated_impl", "choose_impl", "estimated_attention", "sparse_attention"]

SparseAttentionImpl = Literal["auto", "reference", "gather", "pallas_triton"]


def choose_impl() -> SparseAttentionImpl:
    """Return what `auto` takes: kernels that split each row, on a GPU that passes their check; else gathered rows."""
    return "pallas_triton" if is_trusted("sparse_attention", _agree) else "gather"


def choose_estimated_impl() -> SparseAttentionImpl:
    """Return what `auto` takes in `estimated_attention`: the same kernels if they pass its check, else gathers."""
    return "pallas_triton" if is_trusted("estimated_attention", _estimates_agree) else "gather"


def _agree() -> bool:
    """Return whether kernels and reference agree on two sequences, several tiles, position 0, and slots not real."""
    keys = jax.random.split(jax.random.key(0), 4)
    queries = jax.random.normal(keys[0], (2, 6, 64), jnp.float32)
    cache = [jax.random.normal(key, (2, 500, 2, 64), jnp.float32) for key in keys[1:3]]
    indices = jnp.argsort(jax.random.uniform(keys[3], (2, 2, 500)), axis=-1)[..., :200].astype(jnp.int32)
    is_real = jnp.broadcast_to(jnp.arange(200)[None, None, :] < 150, indices.shape)
    return _agrees(sparse_attention, queries, *cache, indices, is_real)


def _estimates_agree() -> bool:
    """Return whether kernels and reference agree on two sequences of two lengths."""
    return _agrees(estimated_attention, *EstimatedAttentionCase("check", 2, 6, 2, 64, 2, 500, 100, "float32").draw()[0])


def _agrees(op: Callable[..., Any], *args: Any) -> bool:
    with jax.default_matmul_precision("highest"):  # of the reference: sums of many products
        found, expected = (
            jax.tree.leaves(jax.jit(functools.partial(op, impl=impl))(*args)) for impl in ("pallas_triton", "reference")
        )
    return all(bool(jnp.allclose(one, other, atol=1e-2)) for one, other in zip(found, expected, strict=True))


def sparse_attention(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    impl: SparseAttentionImpl = "auto",
    axis: str | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """Return softmax attention over the rows that `indices` names: scores divided by sqrt(head_dim), sums in float32.

    Args:
        queries: of each sequence's newest token, after RoPE.
        keys: cached, after RoPE.
        values: of the same tokens.
        indices: one selection per KV head (heads = kv_heads) or per query head (heads = q_heads), each position once.
        is_real: False slots are not read; at least one slot of each row is real.
        impl: `auto` chooses by device; a named implementation runs or raises.
        axis: over which the cache's positions are split (`token_axis`): each device reads its own rows, and all get
            what was read together. The reference takes none.

    Raises: InputError where heads is neither.
    """
    _check_heads(queries, keys, indices)
    backends: dict[str, Callable[..., Array]] = {
        "reference": sparse_attention_reference,
        "gather": functools.partial(sparse_attention_gather, axis=axis),
        "pallas_triton": functools.partial(sparse_attention_pallas_triton, axis=axis),
    }
    run = pick_backend("sparse_attention", backends, impl, choose_impl, axis)
    return run(queries, keys, values, indices, is_real)


def estimated_attention(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    ends: Int32[Array, "batch"],
    moments: Moments,
    params: TailParams,
    impl: SparseAttentionImpl = "auto",
    axis: str | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Return attention over selected rows and the newest, with an estimate of it over the others (`tail`).

    Args:
        ends: cached tokens of each sequence; its query belongs to the last. The newest are those of the last one's
            block of `moments.BLOCK`.
        moments: of all tokens before the newest. The reference, which reads the whole cache, makes its own.
        params: corrections; leaves lead with the batch, or with 1 where they are the same for all of it.

    The other arguments are those of `sparse_attention`, and so are the errors; positions from `ends` on are not real.

    Returns: outputs, and the share of the attention mass that was estimated.
    """
    _check_heads(queries, keys, indices)
    backends: dict[str, Callable[..., tuple[Array, Array]]] = {
        "reference": estimated_attention_reference,
        "gather": functools.partial(estimated_attention_gather, axis=axis),
        "pallas_triton": functools.partial(estimated_attention_pallas_triton, axis=axis),
    }
    run = pick_backend("estimated_attention", backends, impl, choose_estimated_impl, axis)
    return run(queries, keys, values, indices, is_real, ends, moments, params)


def _check_heads(queries: Array, keys: Array, indices: Array) -> None:
    q_heads, kv_heads = queries.shape[1], keys.shape[2]
    if indices.shape[1] not in (q_heads, kv_heads) or q_heads % kv_heads:
        raise InputError(
            f"indices {indices.shape} need one row per KV head ({kv_heads}) or per query head ({q_heads}), "
            "and q_heads must be a multiple of kv_heads"
        )
