"""What keys are ranked by, and which are top: the highest true post-RoPE dot products among the keys a query may see.

That is of each query head, or of all query heads of a KV head together (`target`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from spotlight_jax.config.ranking import LossConfig, Target
from spotlight_jax.kernels.select_top import select_top
from spotlight_jax.selector.selection import ordered_ranks


def top_counts(positions: Int32[Array, "q_len"], kv_len: int, cfg: LossConfig) -> Int32[Array, "q_len"]:
    """Return each query's top count: n - int((1 - share) n) keys and at least `min_top`, never more than it sees."""
    visible = positions + 1
    base = visible if cfg.top_rule == "prefix" else jnp.full_like(visible, kv_len)
    share = base - jnp.floor((1 - cfg.top_share) * base + 1e-4).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(share, cfg.min_top), visible)


def most_top(kv_len: int, cfg: LossConfig) -> int:
    """Return the largest of `top_counts` in a window of kv_len."""
    return min(max(kv_len - int((1 - cfg.top_share) * kv_len), cfg.min_top), kv_len)


def true_scores(
    queries: Shaped[Array, "q_len q_heads head_dim"],
    keys: Shaped[Array, "kv_len kv_heads head_dim"],
    positions: Int32[Array, "q_len"],
) -> Float[Array, "q_heads q_len kv_len"]:
    """Return post-RoPE dot products in float32, unscaled; -inf where a query does not see a key."""
    q_len, q_heads, head_dim = queries.shape
    kv_len, kv_heads, _ = keys.shape
    grouped = queries.reshape(q_len, kv_heads, q_heads // kv_heads, head_dim)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(kv_len)[None, :] <= positions[:, None]
    return jnp.where(visible[None], scores.reshape(q_heads, q_len, kv_len), -jnp.inf)


def target_scores(
    logits: Float[Array, "q_heads q_len kv_len"], kv_heads: int, target: Target
) -> Float[Array, "heads q_len kv_len"]:
    """Return what ranks keys, in logits: the attention's own, or the log of a group's summed probabilities."""
    if target == "query_head":
        return logits
    grouped = logits.reshape(kv_heads, -1, *logits.shape[1:])
    return jax.nn.logsumexp(jax.nn.log_softmax(grouped, axis=-1), axis=1)


def find_top(
    scores: Float[Array, "q_heads q_len kv_len"], counts: Int32[Array, "one q_len one"], largest: int
) -> tuple[Int32[Array, "q_heads q_len largest"], Float[Array, "q_heads q_len largest"]]:
    """Return positions and scores of each query's top set, real ones first; -inf past its count.

    Sorting is fastest on a CPU; a GPU finds the cut by counting (`kernels/select_top`) in a third of the time.
    """
    if jax.default_backend() == "cpu":
        values, positions = jax.lax.top_k(scores, largest)
        is_real = jnp.arange(largest)[None, None] < counts
    else:
        budgets = jnp.broadcast_to(counts[..., 0], scores.shape[:2])
        positions, is_real = select_top(ordered_ranks(scores), budgets, largest)
        values = jnp.take_along_axis(scores, positions, axis=-1)
    return positions, jnp.where(is_real, values, -jnp.inf)


def all_scores(
    weights: Float[Array, "heads score_heads q_len code_bits"], codes: Float[Array, "code_heads kv_len code_bits"]
) -> Float[Array, "heads q_len kv_len"]:
    """Return differentiable scores of every key."""
    heads, sums, q_len, code_bits = weights.shape
    grouped = weights.reshape(codes.shape[0], -1, sums, q_len, code_bits)
    return jnp.max(jnp.einsum("kgrtc,ksc->kgrts", grouped, codes), axis=2).reshape(heads, q_len, -1)
