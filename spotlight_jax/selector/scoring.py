"""Scores by which cached tokens are chosen: one function a method, higher is better, all with one result layout.

Every function returns `[batch, q_len, heads, kv_len]`, where heads are the query heads, or the KV heads when one set is
chosen per KV head (the scores of its query heads are then summed). What a query may not see is not their concern.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.selector.base import HashFunctions, sum_groups


def hash_scores(
    functions: HashFunctions,
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    codes: UInt32[Array, "batch code_heads words kv_len"],
    per_kv_head: bool,
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Return learned scores of one layer (see `weights`), exact integers, for any form of hash functions."""
    return output_scores(functions, functions.hash_queries(queries), codes, per_kv_head)


def output_scores(
    functions: HashFunctions,
    outputs: Float[Array, "batch q_len q_heads code_bits"],
    codes: UInt32[Array, "batch code_heads words kv_len"],
    per_kv_head: bool,
) -> Int32[Array, "batch q_len heads kv_len"]:
    """Return `hash_scores` from what `hash_queries` gave."""
    adds, group = functions.adds_scores(per_kv_head), outputs.shape[2] // functions.kv_heads
    is_joint = per_kv_head and not adds
    weights = functions.integer_weights(outputs, is_joint)
    scores = match_score(codes, weights, functions.weight_bounds(group, is_joint).bits)
    return sum_groups(scores, functions.kv_heads) if adds else scores


def hash_score_range(functions: HashFunctions, group: int, per_kv_head: bool) -> tuple[int, int]:
    """Return the least and greatest score that `hash_scores` can give: what selection by counting searches."""
    adds = functions.adds_scores(per_kv_head)
    least, greatest = functions.weight_bounds(group, per_kv_head and not adds).score_range
    return (group * least, group * greatest) if adds else (least, greatest)


def exact_scores(
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    keys: Shaped[Array, "batch kv_len kv_heads head_dim"],
    per_kv_head: bool,
) -> Float[Array, "batch q_len heads kv_len"]:
    """Return the oracle's scores: true post-RoPE dot products, or their sum over each group."""
    kv_heads = keys.shape[2]
    if per_kv_head:
        queries, keys = sum_groups(queries.astype(jnp.float32), kv_heads), keys.astype(jnp.float32)
    grouped = queries.reshape(*queries.shape[:2], kv_heads, -1, queries.shape[-1])
    scores = jnp.einsum("btkgd,bskd->btkgs", grouped, keys, preferred_element_type=jnp.float32)
    return scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
