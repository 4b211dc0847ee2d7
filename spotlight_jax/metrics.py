"""How good a selection is: which queries are looked at, overlap with the oracle's, and attention mass captured."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped


@flax.struct.dataclass
class SelectionQuality:
    """Means over queries, per selecting head."""

    iou: Float[Array, "*layers heads"]  # intersection over union with the oracle's selection
    recall: Float[Array, "*layers heads"]  # share of the oracle's selection that was chosen
    mass: Float[Array, "*layers heads"]  # attention probability of the chosen tokens, mean over the head's group
    oracle_mass: Float[Array, "*layers heads"]  # the same for the oracle's selection


def spread_positions(window: int, count: int) -> Int32[np.ndarray, "picks"]:
    """Positions of the queries to look at, spread evenly over a window, the last one included."""
    return ((np.arange(1, count + 1) * window) // count - 1).astype(np.int32)


def attention_probabilities(
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    keys: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
    heads: int,
) -> Float[Array, "batch q_len heads kv_len"]:
    """Dense attention of each query, averaged over the query heads that select together (heads = q_heads: none do)."""
    batch, q_len, q_heads, head_dim = queries.shape
    grouped = queries.reshape(batch, q_len, keys.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgd,bskd->btkgs", grouped, keys, preferred_element_type=jnp.float32) / jnp.sqrt(head_dim)
    visible = jnp.arange(keys.shape[1])[None, None, :] <= positions[:, :, None]
    logits = jnp.where(visible[:, :, None, None], logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.mean(probabilities.reshape(batch, q_len, heads, q_heads // heads, -1), axis=3)


def captured_mass(
    chosen: Bool[Array, "batch q_len heads kv_len"], probabilities: Float[Array, "batch q_len heads kv_len"]
) -> Float[Array, "heads"]:
    """Attention probability of the chosen tokens, mean over queries."""
    return jnp.mean(jnp.sum(jnp.where(chosen, probabilities, 0.0), axis=-1), axis=(0, 1))


def selection_quality(
    chosen: Bool[Array, "batch q_len heads kv_len"],
    oracle: Bool[Array, "batch q_len heads kv_len"],
    probabilities: Float[Array, "batch q_len heads kv_len"],
) -> SelectionQuality:
    """IoU, recall and captured mass of a selection beside the oracle's."""
    common = jnp.sum(chosen & oracle, axis=-1)
    either = jnp.sum(chosen | oracle, axis=-1)
    wanted = jnp.sum(oracle, axis=-1)
    return SelectionQuality(
        iou=jnp.mean(common / jnp.maximum(either, 1), axis=(0, 1)),
        recall=jnp.mean(common / jnp.maximum(wanted, 1), axis=(0, 1)),
        mass=captured_mass(chosen, probabilities),
        oracle_mass=captured_mass(oracle, probabilities),
    )
