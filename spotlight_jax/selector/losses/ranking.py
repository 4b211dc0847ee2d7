"""Losses that teach hash functions which keys a query reads, without reading every pair of tokens.

Pairs (Bradley-Terry, arXiv 2508.19740): true top keys of a query must score above its other keys. Pairs (a, b) of a top
key a and another key b cost softplus(-(beta (s_a - s_b) - alpha)). Three samplings keep them few: queries, ranks of the
top set, ranks of the rest. No pair tensor is kept for the backward pass: sums of pairs are `kernels/pair_cost`.

Mass: the attention probability that a query reads, with a cut between what is read and what is not that is soft, so
that keys near it are what is learned from.

"Top" are the highest true post-RoPE dot products among the keys the query may see, of each query head, or of all query
heads of a KV head together, or of both (`target`). Queries are worked on in blocks, so memory is bounded by
`q_heads * queries_at_once * kv_len` scores, never `q_heads * kv_len * kv_len`.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Shaped

from spotlight_jax.config.ranking import RankingConfig, Target
from spotlight_jax.kernels.pair_cost import SLOPES, pair_cost
from spotlight_jax.kernels.select_top import select_top
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.selection import ordered_ranks


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


def most_top(kv_len: int, cfg: RankingConfig) -> int:
    """The largest of `top_counts` in a window of kv_len."""
    return min(max(kv_len - int((1 - cfg.top_share) * kv_len), cfg.min_top), kv_len)


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
    largest = most_top(kv_len, cfg)
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


def _all_scores(
    weights: Float[Array, "heads sums q_len code_bits"], codes: Float[Array, "code_heads kv_len code_bits"]
) -> Float[Array, "heads q_len kv_len"]:
    """Differentiable scores of every key."""
    heads, sums, q_len, code_bits = weights.shape
    grouped = weights.reshape(codes.shape[0], -1, sums, q_len, code_bits)
    return jnp.max(jnp.einsum("kgrtc,ksc->kgrts", grouped, codes), axis=2).reshape(heads, q_len, -1)


def _sampled_scores(
    weights: Float[Array, "heads sums q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    pairs: Pairs,
) -> tuple[Float[Array, "heads q_len tops"], Float[Array, "heads q_len others"]]:
    """Differentiable scores of the sampled keys only: a dot product of query side and soft code."""
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
        top = jnp.take_along_axis(_all_scores(weights, codes), pairs.top, axis=-1)
    return top, _all_scores(weights, codes[:, pairs.others])


def _count_pairs(pairs: Pairs) -> Float[Array, ""]:
    """How many pairs were sampled: a product of counts per query."""
    tops = jnp.sum((pairs.top_weights > 0).astype(jnp.float32), axis=-1)
    return jnp.sum(tops * jnp.sum(pairs.is_other.astype(jnp.float32), axis=-1))


def _pairs_cost(
    weights: Float[Array, "heads sums q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    pairs: Pairs,
    cfg: RankingConfig,
) -> Float[Array, "three"]:
    """Cost of all sampled pairs, how many are ranked wrongly, and how many there are."""
    top, other = _sampled_scores(weights * cfg.beta, codes, pairs)
    cost, wrong = pair_cost(top, pairs.top_weights, other, pairs.is_other, cfg.alpha)
    return jnp.stack([cost, wrong, _count_pairs(pairs)])


def _mass_cost(
    weights: Float[Array, "heads sums q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    ranked: Float[Array, "heads q_len kv_len"],
    positions: Int32[Array, "q_len"],
    cfg: RankingConfig,
) -> Float[Array, "three"]:
    """Attention mass that a soft cut leaves out, that the hard one does, and how many queries leave anything out.

    Keys are read by sigmoid((score - cut) / width). The cut moves with the scores near it, so that as many keys are
    read as before, to first order: raising all scores gains nothing, and a key is worth what its probability is above
    the mean of those near the cut.
    """
    counts = top_counts(positions, codes.shape[1], cfg)[None, :, None]
    is_seen = ranked > -jnp.inf
    probabilities = jax.nn.softmax(ranked, axis=-1)
    scores = jnp.where(is_seen, _all_scores(weights, codes), -jnp.inf)
    fixed = jax.lax.stop_gradient(scores)
    top = _find_top(fixed, counts, most_top(codes.shape[1], cfg))[1]
    cut = jnp.min(jnp.where(top > -jnp.inf, top, jnp.inf), axis=-1, keepdims=True)
    squares = jnp.where(is_seen, jnp.square(jnp.where(is_seen, fixed, 0.0) - cut), 0.0)
    seen = positions[None, :, None] + 1
    width = cfg.softness * jnp.sqrt(jnp.sum(squares, axis=-1, keepdims=True) / seen) + 1e-9
    distance = jnp.where(is_seen, (jnp.where(is_seen, scores, 0.0) - cut) / width, -1e9)
    steepness = jax.lax.stop_gradient(jax.nn.sigmoid(distance) * jax.nn.sigmoid(-distance))
    near = jnp.sum(steepness * jnp.where(is_seen, distance, 0.0), axis=-1, keepdims=True)
    near = near / (jnp.sum(steepness, axis=-1, keepdims=True) + 1e-9)
    read = jax.nn.sigmoid(distance - (near - jax.lax.stop_gradient(near)))
    is_short = counts[..., 0] < seen[..., 0]  # others read all they see
    missed = 1 - jnp.sum(probabilities * read, axis=-1)
    missed_hard = 1 - jnp.sum(jnp.where(fixed >= cut, probabilities, 0.0), axis=-1)
    costs = (jnp.sum(jnp.where(is_short, each, 0.0)) for each in (missed, missed_hard))
    return jnp.stack([*costs, ranked.shape[0] * jnp.sum(is_short.astype(jnp.float32))])


def ranking_loss(
    functions: HashFunctions,
    key: PRNGKeyArray,
    queries: Shaped[Array, "q_len q_heads head_dim"],
    positions: Int32[Array, "q_len"],
    keys: Shaped[Array, "kv_len kv_heads head_dim"],
    gamma: Float[Array, ""],
    cfg: RankingConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One layer's loss on one window, and the share of sampled pairs ranked wrongly (of attention mass missed).

    The loss is the mean over all pairs of all heads and sampled queries (equation of the paper's section on training),
    or over heads and queries, and the mean of such means where there are several targets.
    """
    blocks, targets = max(1, queries.shape[0] // cfg.queries_at_once), cfg.targets
    codes = jnp.swapaxes(functions.soft_codes(keys, gamma), 0, 1)
    blocked = (
        jax.random.split(key, blocks),
        queries.reshape(blocks, -1, *queries.shape[1:]),
        positions.reshape(blocks, -1),
    )

    def rank_keys(block_queries, block_positions):
        logits = true_scores(block_queries, keys, block_positions) * queries.shape[-1] ** -0.5
        return [target_scores(logits, keys.shape[1], target) for target in targets]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SLOPES))
    def block_cost(functions, codes, block_queries, block_positions, sampled):
        # ranks of every key are found again in the backward pass: all blocks' would be kept until then
        targeted = rank_keys(block_queries, block_positions) if cfg.loss == "mass" else sampled
        costs = []
        for target, seen in zip(targets, targeted, strict=True):
            weights = jnp.moveaxis(functions.soft_weights(block_queries, gamma, target == "kv_head"), 0, 2)
            if cfg.loss == "mass":
                costs.append(_mass_cost(weights, codes, seen, block_positions, cfg))
            else:
                costs.append(_pairs_cost(weights, codes, seen, cfg))
        return jnp.stack(costs)

    def add_block(totals, block):
        block_key, block_queries, block_positions = block
        sampled = []
        if cfg.loss == "pairs":
            ranked = rank_keys(block_queries, block_positions)
            sampled = [sample_pairs(block_key, scores, block_positions, cfg) for scores in ranked]
        return totals + block_cost(functions, codes, block_queries, block_positions, sampled), None

    totals, _ = jax.lax.scan(add_block, jnp.zeros((len(targets), 3)), blocked)
    cost, wrong, count = totals.T
    count = jnp.maximum(count, 1)
    return jnp.mean(cost / count), jnp.mean(wrong / count)
