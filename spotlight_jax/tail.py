"""The tail: an estimate of the attention to tokens that a query does not read.

Attention over the top tokens alone drops the rest of the attention mass. Moments of all cached keys and values say how
the logits of the rest are spread, and how values go with them; what was read is known, so its logits are taken off, and
count n, mean m and variance v of the *unread* logits remain. A query that reads all but the lowest share of a normal
distribution leaves a normal distribution cut off from above:

    s, c    of the cut normal that has this mean and this variance:  s^2 = v / (1 - a h(a) - h(a)^2),  c = m + s h(a)
    mass    = n exp(c + s^2 / 2) Phi(a - s) / Phi(a)
    t       = c + s^2 - s h(a - s)                                      the mean unread logit where exp(x) weighs it
    value   = mean(y) + cov(y, x) / var(x) * (t - mean(x))             the linear regression of values on logits, at t
    output  = (sum_read e^x y + mass * value) / (sum_read e^x + mass)

with h = phi / Phi, and a the standard normal quantile of the unread share; mean(x), var(x), mean(y) and cov(y, x) are
those of all tokens. A few corrections of each query head (`TailParams`) are trained to make outputs those of dense
attention. The first token of a sequence, whose key and value are like no other's, is in no moment: it is read, or left
out.

A query always reads the newest tokens, those of its own block: they are in no moment yet (`moments`).
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

from spotlight_jax.moments import Moments, block_start

NOTHING = -1e30  # the log of no mass: finite, so that differences of it are
_LEAST_VARIANCE = 1e-6
_MOST_SPREAD = 12.0  # standard deviation of logits beyond which exp of them is no estimate
_LEAST_SHARE = 1e-5  # of tokens read: the quantile stays finite
# of exp(x^2) erfc(x) as t exp(p(t)), t = 1 / (1 + x / 2): relative error 1.2e-7 (Press et al., Numerical Recipes, 6.2)
_ERFCX = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


class Corrections(NamedTuple):
    """Corrections of the estimate for each of some rows; `by_share` ones are multiplied with the quantile less 2."""

    cut: Array  # added to the quantile where unread logits are cut off
    cut_by_share: Array
    log_mass: Array  # added to the log of the mass
    log_mass_by_share: Array
    spread: Array  # of the log mass, by the logits' standard deviation
    slope: Array  # factor of the difference between the value and the values' mean
    slope_by_share: Array
    gate: Array  # 1, or 0 for a head that does better without the tail


@flax.struct.dataclass
class TailParams:
    """Corrections of the estimate, a row of each query head; those with two columns are a + b (quantile - 2)."""

    cut: Float[Array, "*layers q_heads two"]
    log_mass: Float[Array, "*layers q_heads two"]
    spread: Float[Array, "*layers q_heads"]
    slope: Float[Array, "*layers q_heads two"]
    gate: Float[Array, "*layers q_heads"]

    def grouped(self, kv_heads: int) -> Corrections:
        """Return corrections with an axis of KV heads and one of the query heads of each, behind what leads them."""
        pairs = [leaf[..., column] for leaf in (self.cut, self.log_mass) for column in (0, 1)]
        columns = (*pairs, self.spread, self.slope[..., 0], self.slope[..., 1], self.gate)
        return Corrections(*(leaf.reshape(*leaf.shape[:-1], kv_heads, -1) for leaf in columns))


@flax.struct.dataclass
class LogitMoments:
    """Count, mean and variance of some tokens' logits, for each query head."""

    count: Float[Array, "*rows"]
    mean: Float[Array, "*rows"]
    variance: Float[Array, "*rows"]


@flax.struct.dataclass
class ValueMoments:
    """Mean of the tokens' values, and their covariance with the logits of each query head."""

    mean: Float[Array, "*rows head_dim"]
    covariance: Float[Array, "*rows head_dim"]


def init_tail(layers: int, q_heads: int) -> TailParams:
    """Return corrections that change nothing: the estimate of a cut normal distribution."""
    pair, one = jnp.zeros((layers, q_heads, 2)), jnp.zeros((layers, q_heads))
    return TailParams(cut=pair, log_mass=pair, spread=one, slope=pair.at[..., 0].set(1.0), gate=jnp.ones_like(one))


def query_moments(
    moments: Moments, queries: Float[Array, "batch kv_heads group head_dim"]
) -> tuple[LogitMoments, ValueMoments]:
    """Return the moments of all counted tokens by query head: rows `[batch, kv_heads, group]`."""
    head_dim = queries.shape[-1]
    scaled = queries.astype(jnp.float32) * head_dim**-0.5
    covariance = moments.covariance.astype(jnp.float32)
    products = jnp.einsum("bkij,bkgj->bkgi", covariance, scaled, precision="highest")
    logits = LogitMoments(
        count=jnp.broadcast_to(moments.count[:, None, None], scaled.shape[:-1]),
        mean=jnp.einsum("bkd,bkgd->bkg", moments.key, scaled, precision="highest"),
        variance=jnp.sum(products[..., :head_dim] * scaled, axis=-1),
    )
    mean = jnp.broadcast_to(moments.value[:, :, None], scaled.shape)
    return logits, ValueMoments(mean, products[..., head_dim:])


def take_off(
    whole: LogitMoments, count: Float[Array, "*rows"], logits: Float[Array, "*rows"], squares: Float[Array, "*rows"]
) -> LogitMoments:
    """Return the moments of what is left when some tokens are taken off.

    Args:
        whole: moments of all.
        count: how many are taken off.
        logits: their sum of x, the difference of a logit from the mean of all.
        squares: their sum of x^2.
    """
    left = whole.count - count
    divisor = jnp.maximum(left, 1.0)
    shift = -logits / divisor
    variance = (whole.count * whole.variance - squares) / divisor - shift * shift
    return LogitMoments(left, whole.mean + shift, jnp.maximum(variance, 0.0))


def _log_cdf_and_hazard(x: Array) -> tuple[Array, Array]:
    """Return log Phi(x) and phi(x) / Phi(x) of the standard normal, by operations that kernels have, too."""
    z = jnp.abs(x) * 0.5**0.5
    t = 1 / (1 + 0.5 * z)
    power = jnp.full_like(t, _ERFCX[-1])
    for factor in reversed(_ERFCX[:-1]):
        power = power * t + factor
    scaled = t * jnp.exp(power)  # exp(z^2) erfc(z)
    bell = jnp.exp(-z * z)
    above = 1 - 0.5 * scaled * bell  # Phi(|x|)
    log_cdf = jnp.where(x > 0, jnp.log(above), jnp.log(0.5 * scaled) - z * z)
    root = (2 / np.pi) ** 0.5
    return log_cdf, root * jnp.where(x > 0, 0.5 * bell / above, 1 / scaled)


def _upper_quantile(share: Array) -> Array:
    """Return where a standard normal variable is higher with this probability of at most 1/2, to 4.5e-4.

    Abramowitz and Stegun, 26.2.23.
    """
    t = jnp.sqrt(-2 * jnp.log(share))
    return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))


def mass_and_slope(
    whole: LogitMoments, unread: LogitMoments, highest: Float[Array, "*rows"], corrections: Corrections
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the log of the unread tokens' attention mass, and by how much of the covariance their value is moved.

    Args:
        whole: moments of all logits.
        unread: moments of those that were not read.
        highest: the highest logit that was read: none of the unread is taken to be higher in the mean.
        corrections: of the rows' heads; broadcast to the rows.
    """
    corrections = Corrections(*(jnp.broadcast_to(one, unread.count.shape) for one in corrections))
    total = jnp.maximum(whole.count, 1.0)
    quantile = _upper_quantile(jnp.clip((total - unread.count) / total, _LEAST_SHARE, 0.5))
    past = quantile - 2.0
    cut = quantile + corrections.cut + past * corrections.cut_by_share
    log_below, hazard = _log_cdf_and_hazard(cut)
    variance = jnp.maximum(unread.variance, _LEAST_VARIANCE)
    kept = jnp.maximum(1 - cut * hazard - hazard * hazard, 0.05)  # of a normal variable's variance, below the cut
    spread = jnp.minimum(jnp.sqrt(variance / kept), _MOST_SPREAD)
    centre = unread.mean + spread * hazard
    log_count = jnp.log(jnp.maximum(unread.count, 0.5))
    log_tilted, tilted_hazard = _log_cdf_and_hazard(cut - spread)
    log_mass = log_count + centre + 0.5 * spread * spread + log_tilted - log_below
    log_mass = log_mass + corrections.log_mass + past * corrections.log_mass_by_share
    log_mass = log_mass + corrections.spread * jnp.minimum(jnp.sqrt(variance), _MOST_SPREAD)
    tilted = centre + spread * spread - spread * tilted_hazard
    moved = unread.mean - whole.mean
    moved = moved + (corrections.slope + past * corrections.slope_by_share) * (tilted - unread.mean)
    slope = moved / jnp.maximum(whole.variance, _LEAST_VARIANCE)
    log_mass = jnp.minimum(log_mass, log_count + highest)
    is_there = (unread.count > 0.5) & (corrections.gate > 0) & jnp.isfinite(log_mass) & jnp.isfinite(slope)
    return jnp.where(is_there, log_mass, NOTHING), jnp.where(is_there, slope, 0.0)


def estimate(
    whole: LogitMoments,
    unread: LogitMoments,
    values: ValueMoments,
    highest: Float[Array, "*rows"],
    corrections: Corrections,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows head_dim"]]:
    """Return the log of the unread tokens' attention mass, and their mean value under it; args as `mass_and_slope`.

    A value too large for float32 is 0.
    """
    log_mass, slope = mass_and_slope(whole, unread, highest, corrections)
    value = values.mean + values.covariance * slope[..., None]
    return log_mass, jnp.where(jnp.isfinite(value) & (log_mass > NOTHING)[..., None], value, 0.0)


@flax.struct.dataclass
class Split:
    """Attention of some queries in two parts: what they read, and the moments of what they do not."""

    read: Float[Array, "*rows head_dim"]  # softmax-weighted mean of the values read
    log_read: Float[Array, "*rows"]  # log of the sum of exponentials of the logits read
    highest: Float[Array, "*rows"]  # logit read
    whole: LogitMoments
    unread: LogitMoments
    values: ValueMoments


def split_by_logits(
    logits: Float[Array, "batch kv_heads group q_len kv_len"],
    mask: Bool[Array, "batch kv_heads group q_len kv_len"],
    values: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
) -> Split:
    """Return what moments in a cache would give, from all logits: for many queries at once, each with its own past.

    Args:
        logits: scaled, of all tokens; those after a query's position are not looked at.
        mask: which tokens each query reads, the newest among them (`with_newest`).
        values: of all tokens.
        positions: of the queries.

    Returns: rows `[batch, q_len, kv_heads, group]`.
    """
    slots = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :]
    has_moments = ((slots > 0) & (slots < block_start(positions)[:, :, None]))[:, None, None]
    masked = jnp.where(mask, logits, NOTHING)
    highest = masked.max(axis=-1)
    weights = jnp.exp(masked - highest[..., None])
    sums = weights.sum(axis=-1)

    def turn(rows: Array) -> Array:
        return jnp.moveaxis(rows, 3, 1)

    def mix(rows: Array, numbers: Array) -> Array:
        """Return the mean of values by weights that have this sum."""
        mixed = jnp.einsum("bkgts,bskd->bkgtd", rows.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return turn(mixed) / turn(numbers)[..., None]

    def measure(is_in: Array) -> tuple[LogitMoments, Array, Array, Array]:
        counted = jnp.broadcast_to(is_in, logits.shape).astype(jnp.float32)
        count = counted.sum(axis=-1)
        divisor = jnp.maximum(count, 1.0)
        mean = jnp.sum(counted * logits, axis=-1) / divisor
        off = counted * (logits - mean[..., None])
        variance = jnp.sum(off * off, axis=-1) / divisor
        return LogitMoments(turn(count), turn(mean), turn(variance)), counted, off, divisor

    whole, counted, off, divisor = measure(has_moments)
    return Split(
        read=mix(weights, sums),
        log_read=turn(highest + jnp.log(sums)),
        highest=turn(highest),
        whole=whole,
        unread=measure(has_moments & ~mask)[0],
        values=ValueMoments(mix(counted, divisor), mix(off, divisor)),
    )


def attend_by_logits(
    logits: Float[Array, "batch kv_heads group q_len kv_len"],
    mask: Bool[Array, "batch kv_heads group q_len kv_len"],
    values: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
    params: TailParams,
) -> tuple[Float[Array, "batch kv_heads group q_len head_dim"], Float[Array, "batch kv_heads group q_len"]]:
    """Return attention over the mask and an estimate of it over the rest, and the share that is estimated.

    Args as `split_by_logits`.
    """
    split = split_by_logits(logits, mask, values, positions)
    corrections = params.grouped(values.shape[2])
    log_mass, value = estimate(split.whole, split.unread, split.values, split.highest, corrections)
    outputs, share = join(split.read, split.log_read, value, log_mass)
    return jnp.moveaxis(outputs, 1, 3), jnp.moveaxis(share, 1, 3)


def join(
    read: Float[Array, "*rows head_dim"],
    log_read: Float[Array, "*rows"],
    value: Float[Array, "*rows head_dim"],
    log_mass: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Return the attention output of what was read and what was estimated, and the share that was estimated.

    Args:
        read: softmax-weighted mean of the values read.
        log_read: log of the sum of their exponentials.
        value: of the tail.
        log_mass: of the tail.
    """
    share = jax.nn.sigmoid(log_mass - log_read)
    return read + share[..., None] * (value - read), share
