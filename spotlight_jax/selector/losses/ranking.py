"""A layer's loss: what teaches hash functions which keys a query reads, without reading every pair of tokens.

Queries are worked on in blocks, so memory is bounded by `q_heads * queries_at_once * kv_len` scores, never
`q_heads * kv_len * kv_len`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Shaped

from spotlight_jax.config.ranking import LossConfig, MassLoss
from spotlight_jax.kernels.pair_cost import SLOPES
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.losses.mass import mass_cost
from spotlight_jax.selector.losses.pairs import Pairs, pairs_cost, sample_pairs
from spotlight_jax.selector.losses.targets import target_scores, true_scores


def ranking_loss(
    functions: HashFunctions,
    key: PRNGKeyArray,
    queries: Shaped[Array, "q_len q_heads head_dim"],
    positions: Int32[Array, "q_len"],
    keys: Shaped[Array, "kv_len kv_heads head_dim"],
    gamma: Float[Array, ""],
    cfg: LossConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return one layer's loss on one window, and the share of pairs ranked wrongly (of attention mass missed).

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

    def rank_keys(block_queries: Array, block_positions: Array) -> list[Array]:
        logits = true_scores(block_queries, keys, block_positions) * queries.shape[-1] ** -0.5
        return [target_scores(logits, keys.shape[1], target) for target in targets]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SLOPES))
    def block_cost(
        functions: HashFunctions, codes: Array, block_queries: Array, block_positions: Array, sampled: list[Pairs]
    ) -> Array:
        # ranks of every key are found again in the backward pass: all blocks' would be kept until then
        ranked = rank_keys(block_queries, block_positions) if isinstance(cfg, MassLoss) else []
        costs = []
        for place, target in enumerate(targets):
            weights = jnp.moveaxis(functions.soft_weights(block_queries, gamma, target == "kv_head"), 0, 2)
            if isinstance(cfg, MassLoss):
                costs.append(mass_cost(weights, codes, ranked[place], block_positions, cfg))
            else:
                costs.append(pairs_cost(weights, codes, sampled[place], cfg))
        return jnp.stack(costs)

    def add_block(totals: Array, block: tuple[PRNGKeyArray, Array, Array]) -> tuple[Array, None]:
        block_key, block_queries, block_positions = block
        sampled = []
        if not isinstance(cfg, MassLoss):
            ranked = rank_keys(block_queries, block_positions)
            sampled = [sample_pairs(block_key, scores, block_positions, cfg) for scores in ranked]
        return totals + block_cost(functions, codes, block_queries, block_positions, sampled), None

    totals, _ = jax.lax.scan(add_block, jnp.zeros((len(targets), 3)), blocked)
    cost, wrong, count = totals.T
    count = jnp.maximum(count, 1)
    return jnp.mean(cost / count), jnp.mean(wrong / count)
