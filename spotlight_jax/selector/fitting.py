"""What is measured of text before anything is trained, and the hash functions fitted to it.

The transform form is a transform code of the keys, as one codes signals for few bits. A score and the true score differ
by q . (k - decoded k). Its mean square is least when keys are turned so that errors weigh alike in all directions (by
the root of the queries' second moment) and then into their principal axes; each axis gets bits by its variance (Huang
and Schultheiss, Block quantization of correlated Gaussian random variables, 1963), and each of them halves the levels
of those before it (uniform levels: Max, Quantizing for minimum distortion, 1960). A score is the dot product with the
decoded key, which is linear in the bits.

All of it follows from first and second moments, which windows of text add up to one after another.
"""

import dataclasses
import functools
import heapq

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.metrics import attention_probabilities, captured_mass
from spotlight_jax.selector.selection import select_mask

MOST_DIGITS = 7  # of one axis, where axes are not too few for that
# Mean square error of 2^b uniform levels for a standard normal variable, and the step between two levels (Max 1960)
_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041)
_STEP = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041)
_ROOM = 1.25  # levels reach that much further than is best for a normal variable: keys have heavier tails


@flax.struct.dataclass
class Moments:
    """Means over some keys and queries, and their counts, so that moments of parts add up to those of a whole."""

    keys: Float[Array, "*layers"]  # how many
    rows: Float[Array, "*layers"]  # positions of queries
    mean: Float[Array, "*layers kv_heads head_dim"]  # of the keys
    covariance: Float[Array, "*layers kv_heads head_dim head_dim"]
    queries: Float[Array, "*layers kv_heads group head_dim head_dim"]  # second moment of each query head
    summed: Float[Array, "*layers kv_heads head_dim"]  # mean square of the group's summed queries


def measure_moments(
    keys: Shaped[Array, "kv_len kv_heads head_dim"], queries: Shaped[Array, "q_len q_heads head_dim"], skip: int = 1
) -> Moments:
    """Measure one layer's moments on some tokens; keys and queries after RoPE, all keys and some of the queries.

    Args:
        skip: first keys to leave out: that of a text's first token, far from all others, but not those of a later part.
    """
    keys, queries = keys[skip:].astype(jnp.float32), queries.astype(jnp.float32)
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
    mean, exact = jnp.mean(keys, axis=0), jax.lax.Precision.HIGHEST
    centred = keys - mean[None]
    return Moments(
        keys=jnp.float32(keys.shape[0]),
        rows=jnp.float32(queries.shape[0]),
        mean=mean,
        covariance=jnp.einsum("skd,ske->kde", centred, centred, precision=exact) / keys.shape[0],
        queries=jnp.einsum("tkgd,tkge->kgde", grouped, grouped, precision=exact) / queries.shape[0],
        summed=jnp.mean(jnp.square(jnp.sum(grouped, axis=2)), axis=0),
    )


def merge(moments: list[Moments]) -> Moments:
    """Merge the moments of the parts of a text; the spread of the parts' means is part of the covariance.

    Parts add up as in Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979).
    """
    stacked = {
        field.name: np.stack([np.asarray(getattr(each, field.name), np.float64) for each in moments])
        for field in dataclasses.fields(Moments)
    }

    def weigh(name: str, counts: np.ndarray) -> np.ndarray:
        values = stacked[name]
        weights = counts / counts.sum(axis=0)
        return (weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim)) * values).sum(axis=0)

    of_keys, of_queries = stacked["keys"], stacked["rows"]
    found = {"keys": of_keys.sum(axis=0), "rows": of_queries.sum(axis=0), "mean": weigh("mean", of_keys)}
    away = stacked["mean"] - found["mean"]
    stacked["covariance"] = stacked["covariance"] + away[..., :, None] * away[..., None, :]
    found |= {"covariance": weigh("covariance", of_keys)}
    found |= {name: weigh(name, of_queries) for name in ("queries", "summed")}
    return Moments(**{name: jnp.asarray(leaf, jnp.float32) for name, leaf in found.items()})


def fit_layers(
    moments: Moments, code_bits: int
) -> tuple[
    Float[Array, "layers kv_heads head_dim code_bits"],
    Float[Array, "layers kv_heads code_bits"],
    Float[Array, "layers kv_heads head_dim code_bits"],
]:
    """Fit axes, levels and bit weights of all layers, as `fit_axes` does; bit weights of a layer have one size."""
    covariance, queries = (np.asarray(leaf, np.float64) for leaf in (moments.covariance, moments.queries))
    shape = *covariance.shape[:-1], code_bits
    axes, levels, bit_weights = (
        np.zeros(shape, np.float32),
        np.zeros((*shape[:2], code_bits), np.float32),
        np.zeros(shape, np.float32),
    )
    for place in np.ndindex(shape[:2]):
        axes[place], levels[place], bit_weights[place] = fit_axes(covariance[place], queries[place], code_bits)
    scale = np.sqrt(np.mean(np.square(bit_weights), axis=(-3, -2, -1), keepdims=True))  # for a layer: learning rates
    return jnp.asarray(axes), jnp.asarray(levels), jnp.asarray(bit_weights / np.maximum(scale, 1e-30))


def fit_axes(
    covariance: Float[np.ndarray, "head_dim head_dim"],
    queries: Float[np.ndarray, "group head_dim head_dim"],
    code_bits: int,
) -> tuple[
    Float[np.ndarray, "head_dim code_bits"],
    Float[np.ndarray, " code_bits"],
    Float[np.ndarray, "head_dim code_bits"],
]:
    """Fit one KV head's `KeyQuantizer.axes` and `levels`, and `TransformWeights.bit_weights`.

    Every query head's scores count alike, whatever their size: its moment is divided by the spread that it gives them.
    """
    spread = np.maximum(np.einsum("gde,ed->g", queries, covariance), 1e-12)
    root, inverse = _roots(np.mean(queries / spread[:, None, None], axis=0))
    variances, turned = np.linalg.eigh(root @ covariance @ root)
    deviations = np.sqrt(np.maximum(variances, 1e-12))
    digits = allot_digits(np.square(deviations), code_bits)
    counts = digits.tolist()
    axis = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    width = _ROOM * deviations * np.array([step_of(count) * 2.0**count for count in counts])  # of all levels of an axis
    one_digit = 2 * np.sqrt(2 / np.pi) * deviations  # between the means of a normal variable's halves
    worth = np.where(digits[axis] == 1, one_digit[axis], width[axis] * 0.5 ** (place + 1))
    return (root @ turned)[:, axis] / width[axis], 2.0 ** (place + 1), (inverse @ turned)[:, axis] * worth


def _roots(moment: Float[np.ndarray, "d d"]) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d d"]]:
    """Return the symmetric root of a second moment, and its inverse."""
    values, vectors = np.linalg.eigh(moment)
    roots = np.sqrt(np.maximum(values, 1e-6 * max(values.max(), 1e-12)))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def step_of(digits: int) -> float:
    """Return the distance between two of 2^digits levels; past the table's end a digit all but halves it."""
    known = min(digits, len(_STEP) - 1)
    return _STEP[known] * 0.55 ** (digits - known)


def _error_of(digits: int) -> float:
    known = min(digits, len(_ERROR) - 1)
    return _ERROR[known] * 0.3 ** (digits - known)


def allot_digits(variances: Float[np.ndarray, " axes"], code_bits: int) -> Int[np.ndarray, " axes"]:
    """Allot digits to axes, one after another to where it lowers the mean square error most."""
    digits = np.zeros(len(variances), np.int64)
    most = max(MOST_DIGITS, -(-code_bits // len(variances)))
    gains = [(-float(variance) * (_error_of(0) - _error_of(1)), axis) for axis, variance in enumerate(variances)]
    heapq.heapify(gains)
    for _ in range(code_bits):
        _, axis = heapq.heappop(gains)
        digits[axis] += 1
        count = int(digits[axis])
        if count < most:
            heapq.heappush(gains, (-float(variances[axis]) * (_error_of(count) - _error_of(count + 1)), axis))
    return digits


def assign_heads(
    moments: Moments,
    windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    selection: SelectionConfig,
    layers_at_once: int,
) -> Float[Array, "layers kv_heads two group"]:
    """Assign query heads to two score heads: the split that reads most attention mass, or all of them in both.

    Starting from one score head, the query head whose change of sides helps most goes over, until none does. Tokens are
    scored by true dot products, each score head's divided by its standard deviation, on windows of text.

    Args:
        moments: of the same text, from `merge`.
        windows: keys, queries and positions of queries of all layers.
        selection: how many tokens are read.
    """
    layers, kv_heads, group = moments.queries.shape[:3]

    def masses(second: Bool[np.ndarray, "layers options kv_heads group"]) -> Float[np.ndarray, "layers options kv"]:
        args = moments.mean, moments.covariance, jnp.asarray(second)
        rows = [_mass_of_splits(*args, *window, selection, layers_at_once) for window in windows]
        return np.mean([np.asarray(row) for row in rows], axis=0)

    second = np.zeros((layers, kv_heads, group), bool)
    best = masses(np.repeat(second[:, None], group, axis=1))[:, 0]
    for _ in range(group):
        moved = second[:, None] ^ np.eye(group, dtype=bool)[None, :, None]
        found = masses(moved)
        choice = np.argmax(found, axis=1)
        is_better = np.max(found, axis=1) > best + 1e-5
        if not is_better.any():
            break
        chosen = np.take_along_axis(moved, choice[:, None, :, None], axis=1)[:, 0]
        second, best = np.where(is_better[..., None], chosen, second), np.maximum(best, np.max(found, axis=1))
    assignment = np.stack([~second, second], axis=2)
    is_whole = ~np.all(assignment.any(axis=-1), axis=-1)  # all on one side: one score head, twice
    assignment |= is_whole[:, :, None, None]
    return jnp.asarray(assignment, jnp.float32)


@functools.partial(jax.jit, static_argnames=("selection", "layers_at_once"))
def _mass_of_splits(
    mean: Float[Array, "layers kv_heads head_dim"],
    covariance: Float[Array, "layers kv_heads head_dim head_dim"],
    second: Bool[Array, "layers options kv_heads group"],
    keys: Shaped[Array, "layers kv_len kv_heads head_dim"],
    queries: Shaped[Array, "layers q_len q_heads head_dim"],
    positions: Int32[Array, "layers q_len"],
    selection: SelectionConfig,
    layers_at_once: int,
) -> Float[Array, "layers options kv_heads"]:
    """Return the attention mass that each way of splitting groups reads."""

    def measure_layer(args: tuple[Array, ...]) -> Array:
        mean, covariance, second, keys, queries, positions = args
        keys, queries = keys.astype(jnp.float32), queries.astype(jnp.float32)
        probabilities = attention_probabilities(queries[None], keys[None], positions[None], keys.shape[1])
        grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])

        def measure_option(second: Array) -> Array:
            sides = jnp.stack([~second, second], axis=1).astype(jnp.float32)
            sums = jnp.einsum("tkgd,krg->tkrd", grouped, sides)
            variance = jnp.einsum("tkrd,kde,tkre->tkr", sums, covariance, sums)
            scores = jnp.einsum("tkrd,skd->tkrs", sums, keys - mean[None])
            scores = scores * jax.lax.rsqrt(variance + 1e-12)[..., None]
            is_empty = jnp.sum(sides, axis=-1) == 0
            best = jnp.max(jnp.where(is_empty[None, :, :, None], -jnp.inf, scores), axis=2)
            return captured_mass(select_mask(best[None], positions[None], selection), probabilities)

        return jax.lax.map(measure_option, second)

    args = mean, covariance, second, keys, queries, positions
    return jax.lax.map(measure_layer, args, batch_size=layers_at_once)
