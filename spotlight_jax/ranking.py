"""The ranking loss: true top keys of a query must score above its other keys (Bradley-Terry, arXiv 2508.19740).

For query i, pairs (a, b) of a top key a and another key b cost softplus(-(beta (s_a - s_b) - alpha)). "Top" are the
highest true post-RoPE dot products among the keys the query may see, of each query head, or of all query heads of a KV
head together, or of both (`target`). Three samplings keep the pairs few: queries, ranks of the top set, ranks of the
rest. Queries are worked on in blocks, so memory is bounded by `q_heads * queries_at_once * kv_len` scores, never
`q_heads * kv_len * kv_len`. No pair tensor is kept for the backward pass: sums of pairs are `kernels/pair_cost`.
"""

import dataclasses
import functools
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Shaped

from spotlight_jax import hashing
from spotlight_jax.errors import InputError
from spotlight_jax.kernels.pair_cost import SLOPES, pair_cost
from spotlight_jax.kernels.select_top import select_top
from spotlight_jax.selection import ordered_ranks

Target = Literal["query_head", "kv_head"]


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """The ranking loss and its sampling."""

    target: Literal["query_head", "kv_head", "both"] = "query_head"
    """Rank keys for each query head by its dot products (the paper), or for each KV head, as it selects: summed scores
    by the attention probabilities of its query heads together; both: the mean of the two losses, on the same queries
    and other keys."""
    top_share: float = 0.02
    """Share of a query's visible keys that count as top."""
    min_top: int = 20
    """Least number of top keys, as decoding reads at least so many."""
    top_rule: Literal["prefix", "total"] = "prefix"
    """Take the share of the keys a query sees (prefix), or of the whole window for all queries (total: the paper)."""
    queries: int = 256
    """Random queries per window and step."""
    tops: int = 48
    """Random ranks of the top set per query, spread over it; no more than the largest top set of a window."""
    others: int = 256
    """Random ranks of the remaining keys per query."""
    always_top: int = 8
    """So many of the most probable keys are in every sample of tops (0: the paper)."""
    weighting: Literal["uniform", "attention"] = "attention"
    """Weigh all top keys alike (the paper), or half of the weight by attention probability."""
    beta: float = 1.0
    """Slope of the loss."""
    alpha: float = 3.0
    """Margin by which a top key should win (3 in the paper's text, 0 in its released scripts)."""
    queries_at_once: int = 64
    """Queries worked on together: lower it to use less memory."""

    def __post_init__(self) -> None:
        """Refuse what no loss can be computed from."""
        if not 0 < self.top_share < 1:
            raise InputError(f"top_share is {self.top_share}; give a share above 0 and below 1, such as 0.02")
        for name in ("queries", "tops", "others", "queries_at_once", "min_top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.queries > self.queries_at_once and self.queries % self.queries_at_once:
            raise InputError(f"queries ({self.queries}) must be a multiple of queries_at_once ({self.queries_at_once})")
        if self.beta <= 0:
            raise InputError(f"beta is {self.beta}; give a slope above 0")
        if not 0 <= self.always_top <= self.tops:
            raise InputError(f"always_top is {self.always_top}; give 0 to {self.tops}, the number of tops")

    @property
    def targets(self) -> tuple[Target, ...]:
        """For which heads keys are ranked: each has a loss of its own."""
        return ("query_head", "kv_head") if self.target == "both" else (self.target,)


@flax.struct.dataclass
class Pairs:
    """Sampled keys of each query: positions, whether each may be used, and weights of the top ones.

    heads: the query heads, or the KV heads where keys are ranked for a group.
    """

    top: Int32[Array, "heads q_len tops"]
    top_weights: Float[Array, "heads q_len tops"]  # 0 where the rank does not exist
    others: Int32[Array, "others"]  # shared by all heads and queries of a block
    is_other: Bool[Array, "heads q_len others"]


def top_counts(positions: Int32[Array, "q_len"], kv_len: int, cfg: RankingConfig) -> Int32[Array, "q_len"]:
    """Size of each query's top set: n - int((1 - share) n) keys and at least `min_top`, never more than it sees."""
    visible = positions + 1
    base = visible if cfg.top_rule == "prefix" else jnp.full_like(visible, kv_len)
    share = base - jnp.floor((1 - cfg.top_share) * base + 1e-4).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(share, cfg.min_top), visible)


def true_scores(
    queries: Shaped[Array, "q_len q_heads head_dim"],
    keys: Shaped[Array, "kv_len kv_heads head_dim"],
    positions: Int32[Array, "q_len"],
) -> Float[Array, "q_heads q_len kv_len"]:
    """Post-RoPE dot products in float32, unscaled; -inf where a query does not see a key."""
    q_len, q_heads, head_dim = queries.shape
    kv_len, kv_heads, _ = keys.shape
    grouped = queries.reshape(q_len, kv_heads, q_heads // kv_heads, head_dim)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(kv_len)[None, :] <= positions[:, None]
    return jnp.where(visible[None], scores.reshape(q_heads, q_len, kv_len), -jnp.inf)


def target_scores(
    logits: Float[Array, "q_heads q_len kv_len"], kv_heads: int, target: Target
) -> Float[Array, "heads q_len kv_len"]:
    """What keys are ranked by, in logits: the attention's own, or the log of a group's summed probabilities."""
    if target == "query_head":
        return logits
    grouped = logits.reshape(kv_heads, -1, *logits.shape[1:])
    return jax.nn.logsumexp(jax.nn.log_softmax(grouped, axis=-1), axis=1)


def _spread(key: PRNGKeyArray, shape: tuple[int, int], picks: int) -> Float[Array, "q_heads q_len picks"]:
    """Random points of [0, 1), one in each of `picks` equal strata: ranks spread so do not repeat."""
    points = (jnp.arange(picks)[None, None] + jax.random.uniform(key, (*shape, picks))) / picks
    return jnp.minimum(points, 1 - 2**-24)  # the last one can round to 1: a rank past the end, and NaN


def _find_top(
    scores: Float[Array, "q_heads q_len kv_len"], counts: Int32[Array, "one q_len one"], largest: int
) -> tuple[Int32[Array, "q_heads q_len largest"], Float[Array, "q_heads q_len largest"]]:
    """Positions and scores of each query's top set, real ones first; -inf past its count.

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


def sample_pairs(
    key: PRNGKeyArray,
    scores: Float[Array, "heads q_len kv_len"],
    positions: Int32[Array, "q_len"],
    cfg: RankingConfig,
) -> Pairs:
    """Top and other keys of each query and head, by `target_scores`.

    Other keys are drawn from the whole window, once for all heads and queries given; a query drops those that are top
    or that it does not see, as in the paper: one early in the window so has fewer pairs, and less say.
    """
    top_key, other_key = jax.random.split(key)
    kv_len, heads_and_queries = scores.shape[-1], (scores.shape[0], scores.shape[1])
    counts = top_counts(positions, kv_len, cfg)[None, :, None]
    largest = min(max(kv_len - int((1 - cfg.top_share) * kv_len), cfg.min_top), kv_len)
    top_positions, top_values = _find_top(scores, counts, largest)

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


def _top_weights(scores: Float[Array, "heads q_len tops"], cfg: RankingConfig) -> Float[Array, "heads q_len tops"]:
    """1 for every top key, or half of that by its attention probability among the sampled ones; 0 for unseen keys."""
    seen = scores > -jnp.inf
    if cfg.weighting == "uniform":
        return seen.astype(jnp.float32)
    probability = jax.nn.softmax(scores, axis=-1)
    return jnp.where(seen, 0.5 + 0.5 * scores.shape[-1] * probability, 0.0)


def _query_side(
    params: hashing.HashParams,
    queries: Shaped[Array, "q_len q_heads head_dim"],
    gamma: Float[Array, ""],
    hash_cfg: hashing.HashConfig,
) -> dict[Target, Float[Array, "heads q_len code_bits"]]:
    """What soft key codes are multiplied with: soft codes (symmetric) or real weights (asymmetric), of each head and
    summed over groups, so that a group's score is the sum of its heads'."""
    outputs = hashing.hash_queries(params, queries, hash_cfg)
    if hash_cfg.form == "symmetric":
        outputs = hashing.soft_sign(outputs, gamma)
    summed = hashing.sum_groups(outputs, params.stats.scale.shape[0])
    return {"query_head": jnp.swapaxes(outputs, 0, 1), "kv_head": jnp.swapaxes(summed, 0, 1)}


def _sampled_scores(
    weights: Float[Array, "heads q_len code_bits"],
    soft_codes: Float[Array, "code_heads kv_len code_bits"],
    pairs: Pairs,
) -> tuple[Float[Array, "heads q_len tops"], Float[Array, "heads q_len others"]]:
    """Differentiable scores of the sampled keys only: a dot product of query side and soft code."""
    heads, q_len, code_bits = weights.shape
    code_heads = soft_codes.shape[0]
    grouped = weights.reshape(code_heads, -1, q_len, code_bits)
    if jax.default_backend() == "cpu":
        rows = pairs.top.reshape(code_heads, -1, 1)
        top_codes = jnp.take_along_axis(soft_codes, rows, axis=1).reshape(*grouped.shape[:3], -1, code_bits)
        top = jnp.einsum("kgtc,kgtnc->kgtn", grouped, top_codes).reshape(heads, q_len, -1)
    else:  # scoring every key is nothing to a GPU, while adding up gradients of gathered codes takes it long
        every = jnp.einsum("kgtc,ksc->kgts", grouped, soft_codes).reshape(heads, q_len, -1)
        top = jnp.take_along_axis(every, pairs.top, axis=-1)
    other = jnp.einsum("kgtc,ksc->kgts", grouped, soft_codes[:, pairs.others])
    return top, other.reshape(heads, q_len, -1)


def _count_pairs(pairs: Pairs) -> Float[Array, ""]:
    """How many pairs were sampled: a product of counts per query."""
    tops = jnp.sum((pairs.top_weights > 0).astype(jnp.float32), axis=-1)
    return jnp.sum(tops * jnp.sum(pairs.is_other.astype(jnp.float32), axis=-1))


def ranking_loss(
    params: hashing.HashParams,
    key: PRNGKeyArray,
    queries: Shaped[Array, "q_len q_heads head_dim"],
    positions: Int32[Array, "q_len"],
    keys: Shaped[Array, "kv_len kv_heads head_dim"],
    gamma: Float[Array, ""],
    hash_cfg: hashing.HashConfig,
    cfg: RankingConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One layer's loss on one window, and the share of sampled pairs ranked wrongly.

    The loss is the mean over all pairs of all heads and sampled queries (equation of the paper's section on training),
    and the mean of such means where there are several targets.
    """
    blocks, targets = max(1, queries.shape[0] // cfg.queries_at_once), cfg.targets
    soft_codes = jnp.swapaxes(hashing.soft_sign(hashing.hash_keys(params, keys, hash_cfg), gamma), 0, 1)
    blocked = (
        jax.random.split(key, blocks),
        queries.reshape(blocks, -1, *queries.shape[1:]),
        positions.reshape(blocks, -1),
    )

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SLOPES))
    def block_cost(params, soft_codes, block_queries, samples):
        weights, sums = _query_side(params, block_queries, gamma, hash_cfg), []
        for target, pairs in zip(targets, samples, strict=True):
            top, other = _sampled_scores(weights[target] * cfg.beta, soft_codes, pairs)
            cost, wrong = pair_cost(top, pairs.top_weights, other, pairs.is_other, cfg.alpha)
            sums.append(jnp.stack([cost, wrong, _count_pairs(pairs)]))
        return jnp.stack(sums)

    def add_block(totals, block):
        block_key, block_queries, block_positions = block
        logits = true_scores(block_queries, keys, block_positions) * queries.shape[-1] ** -0.5
        ranked = [target_scores(logits, keys.shape[1], target) for target in targets]
        samples = [sample_pairs(block_key, scores, block_positions, cfg) for scores in ranked]
        return totals + block_cost(params, soft_codes, block_queries, samples), None

    totals, _ = jax.lax.scan(add_block, jnp.zeros((len(targets), 3)), blocked)
    cost, wrong, count = totals.T
    count = jnp.maximum(count, 1)
    return jnp.mean(cost / count), jnp.mean(wrong / count)
