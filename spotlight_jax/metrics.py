"""How good a selection is: which queries are looked at, overlap with the oracle's, and attention mass captured."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped


@flax.struct.dataclass
class SelectionQuality:
    """Per selecting head: means over queries, or what each query has."""

    iou: Float[Array, "*rows heads"]  # intersection over union with the oracle's selection
    recall: Float[Array, "*rows heads"]  # share of the oracle's selection that was chosen
    mass: Float[Array, "*rows heads"]  # attention probability of the chosen tokens, mean over the head's group
    oracle_mass: Float[Array, "*rows heads"]  # the same for the oracle's selection


def spread_positions(window: int, count: int) -> Int32[np.ndarray, "picks"]:
    """Return positions of the queries to look at, spread evenly over a window, the last one included."""
    return ((np.arange(1, count + 1) * window) // count - 1).astype(np.int32)


def attention_probabilities(
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    keys: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
    heads: int,
) -> Float[Array, "batch q_len heads kv_len"]:
    """Return dense attention, averaged over the query heads that select together (heads = q_heads: none do)."""
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
    """Return the attention probability of the chosen tokens, mean over queries."""
    return jnp.mean(mass_of_queries(chosen, probabilities), axis=(0, 1))


def mass_of_queries(
    chosen: Bool[Array, "batch q_len heads kv_len"], probabilities: Float[Array, "batch q_len heads kv_len"]
) -> Float[Array, "batch q_len heads"]:
    """Return `captured_mass` of each query."""
    return jnp.sum(jnp.where(chosen, probabilities, 0.0), axis=-1)


def selection_quality(
    chosen: Bool[Array, "batch q_len heads kv_len"],
    oracle: Bool[Array, "batch q_len heads kv_len"],
    probabilities: Float[Array, "batch q_len heads kv_len"],
) -> SelectionQuality:
    """Return IoU, recall and captured mass of a selection, and the oracle's mass: means over queries, `[heads]`."""
    each = quality_of_queries(chosen, oracle, probabilities)
    return jax.tree.map(lambda values: jnp.mean(values, axis=(0, 1)), each)


def quality_of_queries(
    chosen: Bool[Array, "batch q_len heads kv_len"],
    oracle: Bool[Array, "batch q_len heads kv_len"],
    probabilities: Float[Array, "batch q_len heads kv_len"],
) -> SelectionQuality:
    """Return `selection_quality` of each query, `[batch, q_len, heads]`."""
    common = jnp.sum(chosen & oracle, axis=-1)
    either = jnp.sum(chosen | oracle, axis=-1)
    wanted = jnp.sum(oracle, axis=-1)
    return SelectionQuality(
        iou=common / jnp.maximum(either, 1),
        recall=common / jnp.maximum(wanted, 1),
        mass=mass_of_queries(chosen, probabilities),
        oracle_mass=mass_of_queries(oracle, probabilities),
    )


def output_error(
    outputs: Shaped[Array, "batch q_len q_heads head_dim"],
    dense: Shaped[Array, "batch q_len q_heads head_dim"],
    heads: int,
) -> Float[Array, "batch q_len heads"]:
    """Return the squared error of outputs relative to dense ones' square: means over heads that select together."""
    wide = dense.astype(jnp.float32)
    off = jnp.sum(jnp.square(outputs.astype(jnp.float32) - wide), axis=-1)
    errors = off / jnp.maximum(jnp.sum(jnp.square(wide), axis=-1), 1e-9)
    return jnp.mean(errors.reshape(*errors.shape[:2], heads, -1), axis=-1)
