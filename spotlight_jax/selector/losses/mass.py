"""Mass: the attention probability that a query reads, with a cut between what is read and what is not that is soft, so
that keys near it are what is learned from.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from spotlight_jax.config.ranking import MassLoss
from spotlight_jax.selector.losses.targets import all_scores, find_top, most_top, top_counts


def mass_cost(
    weights: Float[Array, "heads score_heads q_len code_bits"],
    codes: Float[Array, "code_heads kv_len code_bits"],
    ranked: Float[Array, "heads q_len kv_len"],
    positions: Int32[Array, "q_len"],
    cfg: MassLoss,
) -> Float[Array, "three"]:
    """Return the attention mass that a soft cut leaves out, that the hard one does, and how many queries leave any out.

    Keys are read by sigmoid((score - cut) / width). The cut moves with the scores near it, so that as many keys are
    read as before, to first order: raising all scores gains nothing, and what a key gains is what its probability is
    above the mean of those near the cut.
    """
    counts = top_counts(positions, codes.shape[1], cfg)[None, :, None]
    is_seen = ranked > -jnp.inf
    probabilities = jax.nn.softmax(ranked, axis=-1)
    scores = jnp.where(is_seen, all_scores(weights, codes), -jnp.inf)
    fixed = jax.lax.stop_gradient(scores)
    top = find_top(fixed, counts, most_top(codes.shape[1], cfg))[1]
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
