"""Attention of one new token over selected cache rows, and what an estimate of the others needs of those rows."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.backends import pick_backend
from spotlight_jax.kernels.sparse_attention.gather import read_selected_gather, sparse_attention_gather
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    read_selected_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.kernels.sparse_attention.reads import Reads
from spotlight_jax.kernels.sparse_attention.reference import read_selected_reference, sparse_attention_reference
from spotlight_jax.kernels.trust import is_trusted

__all__ = ["Reads", "SparseAttentionImpl", "choose_impl", "choose_reads_impl", "read_selected", "sparse_attention"]

SparseAttentionImpl = Literal["auto", "reference", "gather", "pallas_triton"]


def choose_impl() -> SparseAttentionImpl:
    """What `auto` takes: kernels that split each row, on a GPU that passes their check; else gathered rows."""
    return "pallas_triton" if is_trusted("sparse_attention", _agree) else "gather"


def choose_reads_impl() -> SparseAttentionImpl:
    """What `auto` takes in `read_selected`: the same kernels, where they pass this op's check; else gathered rows."""
    return "pallas_triton" if is_trusted("read_selected", _reads_agree) else "gather"


def _agree() -> bool:
    return _agrees(sparse_attention)


def _reads_agree() -> bool:
    keys = jax.random.split(jax.random.key(1))
    mean_values = jax.random.normal(keys[1], (2, 2, 64), jnp.float32)
    return _agrees(read_selected, jax.random.normal(keys[0], (2, 6), jnp.float32), mean_values)


def _agrees(op: Callable[..., Any], *means: Array) -> bool:
    """Kernels and reference on two sequences, a budget of several tiles, position 0, and slots that are not real."""
    keys = jax.random.split(jax.random.key(0), 4)
    queries = jax.random.normal(keys[0], (2, 6, 64), jnp.float32)
    cache = [jax.random.normal(key, (2, 500, 2, 64), jnp.float32) for key in keys[1:3]]
    indices = jnp.argsort(jax.random.uniform(keys[3], (2, 2, 500)), axis=-1)[..., :200].astype(jnp.int32)
    is_real = jnp.broadcast_to(jnp.arange(200)[None, None, :] < 150, indices.shape)
    with jax.default_matmul_precision("highest"):  # of the reference: sums of many products
        found, expected = (
            jax.tree.leaves(jax.jit(functools.partial(op, impl=impl))(queries, *cache, indices, is_real, *means))
            for impl in ("pallas_triton", "reference")
        )
    return all(bool(jnp.allclose(one, other, atol=1e-2)) for one, other in zip(found, expected, strict=True))


def sparse_attention(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    impl: SparseAttentionImpl = "auto",
) -> Float[Array, "batch q_heads head_dim"]:
    """Softmax attention over the rows `indices` names, scores divided by sqrt(head_dim), accumulated in float32.

    Args:
        indices: one selection per KV head (heads = kv_heads) or per query head (heads = q_heads), each position once.
        is_real: False slots are not read; at least one slot of each row is real.
        impl: `auto` chooses by device; a named implementation runs or raises.

    Raises: InputError where heads is neither.
    """
    _check_heads(queries, keys, indices)
    backends: dict[str, Callable[..., Array]] = {
        "reference": sparse_attention_reference,
        "gather": sparse_attention_gather,
        "pallas_triton": sparse_attention_pallas_triton,
    }
    run = pick_backend("sparse_attention", backends, impl, choose_impl)
    return run(queries, keys, values, indices, is_real)


def read_selected(
    queries: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch max_len kv_heads head_dim"],
    values: Float[Array, "batch max_len kv_heads head_dim"],
    indices: Int32[Array, "batch heads budget"],
    is_real: Bool[Array, "batch heads budget"],
    mean_logits: Float[Array, "batch q_heads"],
    mean_values: Float[Array, "batch kv_heads head_dim"],
    impl: SparseAttentionImpl = "auto",
) -> Reads:
    """Return what `sparse_attention` does in float32, with sums over the rows that were read; see `Reads`.

    Args:
        mean_logits: subtracted from the logits in those sums.
        mean_values: subtracted from the values in those sums.

    The other arguments are those of `sparse_attention`, and so are the errors.
    """
    _check_heads(queries, keys, indices)
    backends: dict[str, Callable[..., Reads]] = {
        "reference": read_selected_reference,
        "gather": read_selected_gather,
        "pallas_triton": read_selected_pallas_triton,
    }
    run = pick_backend("read_selected", backends, impl, choose_reads_impl)
    return run(queries, keys, values, indices, is_real, mean_logits, mean_values)


def _check_heads(queries: Array, keys: Array, indices: Array) -> None:
    q_heads, kv_heads = queries.shape[1], keys.shape[2]
    if indices.shape[1] not in (q_heads, kv_heads) or q_heads % kv_heads:
        raise InputError(
            f"indices {indices.shape} need one row per KV head ({kv_heads}) or per query head ({q_heads}), "
            "and q_heads must be a multiple of kv_heads"
        )
