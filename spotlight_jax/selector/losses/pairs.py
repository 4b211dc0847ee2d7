"""Pairs (Bradley-Terry, arXiv 2508.19740): true top keys of a query must score above its other keys.

Pairs (a, b) of a top key a and another key b cost softplus(-(beta (s_a - s_b) - alpha)). Three samplings keep them few:
queries, ranks of the top set, ranks of the rest. No pair tensor is kept for the backward pass: sums of pairs are
`kernels/pair_cost`.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from spotlight_jax.config.ranking import PairLoss
from spotlight_jax.kernels.pair_cost import pair_cost
from spotlight_jax.selector.losses.targets import all_scores, find_top, most_top, top_counts


@flax.struct.dataclass
class Pairs:
    """Sampled keys of each query: positions, whether each may be used, and weights of the top ones.

    heads: the query heads, or the KV heads where keys are ranked for a group.
    """

    top: Int32[Array, "heads q_len tops"]
    top_weights: Float[Array, "heads q_len tops"]  # 0 where the rank does not exist
    others: Int32[Array, "others"]  # shared by all heads and queries of a block
    is_other: Bool[Array, "heads q_len others"]


def _spread(key: PRNGKeyArray, shape: tuple[int, int], picks: int) -> Float[Array, "q_heads q_len picks"]:
    """Return random points of [0, 1), one in each of `picks` equal strata: such ranks do not repeat."""
    points = (jnp.arange(picks)[None, None] + jax.random.uniform(key, (*shape, picks))) / picks
    return jnp.minimum(points, 1 - 2**-24)  # the last one can round to 1: a rank past the end, and NaN


def sample_pairs(
    key: PRNGKeyArray,
    scores: Float[Array, "heads q_len kv_len"],
    positions: Int32[Array, "q_len"],
    cfg: PairLoss,
) -> Pairs:
    """Sample top and other keys of each query and head, by `target_scores`.

    Other keys are drawn from the whole window, once for all heads and queries given; a query drops those that are top
    or that it does not see, as in the paper: one early in the window so has fewer pairs, and less weight.
    """
    top_key, other_key = jax.random.split(key)
    kv_len, heads_and_queries = scores.shape[-1], (scores.shape[0], scores.shape[1])
    counts = top_counts(positions, kv_len, cfg)[None, :, None]
    largest = most_top(kv_len, cfg)
    top_positions, top_values = find_top(scores, counts, largest)

    picks = min(cfg.tops, largest)
    always = min(cfg.always_top, picks)
    ranks = (_spread(top_key, heads_and_queries, picks - always) * counts).astype(jnp.int32)
    if always:
        ranks = jnp.concatenate([jax.lax.top_k(top_values, always)[1], ranks], axis=-1)
    top = jnp.take_along_axis(top_positions, ranks, axis=-1)
    sampled_values = jnp.take_along_axis(top_values, ranks, axis=-1)

    others = (_spread(other_key, (1, 1), min(cfg.others, kv_len))[0, 0] * kv_len).astype(jnp.int32)
    other_values = scores[..., others]
    lowest_top = jnp.min(jnp.where(top_values > -jnp.inf, top_values, jnp.inf), axis=-1, keepdims=True)
    is_other = (other_values > -jnp.inf) & (other_values < lowest_top)
    weights = _top_weights(sampled_values, cfg)
    return Pairs(top=top.astype(jnp.int32), top_weights=weights, others=others, is_other=is_other)


def _top_weights(scores: Float[Array, "heads q_len tops"], cfg: PairLoss) -> Float[Array, "heads q_len tops"]:
    """Return 1 for every top key, or half of that by its attention probability among those sampled; 0 if unseen."""
    seen = scores > -jnp.inf
    if cfg.weighting == "uniform":
        return seen.astype(jnp.float32)
    probability = jax.nn.softmax(scores, axis=-1)
    return jnp.where(seen, 0.5 + 0.5 * scores.shape[-1] * probability, 0.0)


def _sampled_scores(
    weights: Float[Array, "heads score_heads q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    pairs: Pairs,
) -> tuple[Float[Array, "heads q_len tops"], Float[Array, "heads q_len others"]]:
    """Return differentiable scores of the sampled keys only: a dot product of query side and soft code."""
    heads, sums, q_len, code_bits = weights.shape
    code_heads = codes.shape[0]
    if jax.default_backend() == "cpu":
        grouped = weights.reshape(code_heads, -1, sums, q_len, code_bits)
        rows = pairs.top.reshape(code_heads, -1, 1)
        top_codes = jnp.take_along_axis(codes, rows, axis=1).reshape(
            code_heads, -1, q_len, pairs.top.shape[2], code_bits
        )
        top = jnp.max(jnp.einsum("kgrtc,kgtnc->kgrtn", grouped, top_codes), axis=2).reshape(heads, q_len, -1)
    else:  # scoring every key is nothing to a GPU, while adding up gradients of gathered codes takes it long
        top = jnp.take_along_axis(all_scores(weights, codes), pairs.top, axis=-1)
    return top, all_scores(weights, codes[:, pairs.others])


def _count_pairs(pairs: Pairs) -> Float[Array, ""]:
    """Return how many pairs were sampled: a product of counts per query."""
    tops = jnp.sum((pairs.top_weights > 0).astype(jnp.float32), axis=-1)
    return jnp.sum(tops * jnp.sum(pairs.is_other.astype(jnp.float32), axis=-1))


def pairs_cost(
    weights: Float[Array, "heads score_heads q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    pairs: Pairs,
    cfg: PairLoss,
) -> Float[Array, "three"]:
    """Return the cost of all sampled pairs, how many are ranked wrongly, and how many there are."""
    top, other = _sampled_scores(weights * cfg.beta, codes, pairs)
    cost, wrong = pair_cost(top, pairs.top_weights, other, pairs.is_other, cfg.alpha)
    return jnp.stack([cost, wrong, _count_pairs(pairs)])
