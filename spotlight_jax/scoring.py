"""Scores by which cached tokens are chosen: one function a method, higher is better, all with one result layout.

Every function returns `[batch, q_len, heads, kv_len]`, where heads are the query heads, or the KV heads when one set is
chosen per KV head (the scores of its query heads are then summed). What a query may not see is not their concern.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from spotlight_jax import hashing
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.kernels.match_score import match_score


def hash_scores(
    params: hashing.HashParams,
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    codes: UInt32[Array, "batch code_heads words kv_len"],
    cfg: HashConfig,
    per_kv_head: bool,
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Learned scores of one layer (see `weights`), exact integers, for any form of hash function."""
    return output_scores(params, hashing.hash_queries(params, queries, cfg), codes, cfg, per_kv_head)


def output_scores(
    params: hashing.HashParams,
    outputs: Float[Array, "batch q_len q_heads code_bits"],
    codes: UInt32[Array, "batch code_heads words kv_len"],
    cfg: HashConfig,
    per_kv_head: bool,
) -> Int32[Array, "batch q_len heads kv_len"]:
    """`hash_scores` from what `hash_queries` gave."""
    is_joint = per_kv_head and codes.shape[1] == params.kv_heads
    weights = hashing.integer_weights(params, outputs, cfg, is_joint)
    group = outputs.shape[2] // params.kv_heads
    scores = match_score(codes, weights, hashing.weight_bounds(cfg, group, is_joint).bits)
    if per_kv_head and not is_joint:  # a code per query head: scores are summed, not weights
        scores = hashing.sum_groups(scores, params.kv_heads)
    return scores


def hash_score_range(cfg: HashConfig, group: int, per_kv_head: bool) -> tuple[int, int]:
    """Least and greatest score `hash_scores` can give: what selection by counting searches."""
    if cfg.code_heads == "query" and per_kv_head:
        least, greatest = hashing.weight_bounds(cfg, group, False).score_range
        return group * least, group * greatest
    return hashing.weight_bounds(cfg, group, per_kv_head).score_range


def exact_scores(
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    keys: Shaped[Array, "batch kv_len kv_heads head_dim"],
    per_kv_head: bool,
) -> Float[Array, "batch q_len heads kv_len"]:
    """The oracle: true post-RoPE dot products, or their sum over each group."""
    kv_heads = keys.shape[2]
    if per_kv_head:
        queries, keys = hashing.sum_groups(queries.astype(jnp.float32), kv_heads), keys.astype(jnp.float32)
    grouped = queries.reshape(*queries.shape[:2], kv_heads, -1, queries.shape[-1])
    scores = jnp.einsum("btkgd,bskd->btkgs", grouped, keys, preferred_element_type=jnp.float32)
    return scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
