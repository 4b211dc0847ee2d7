"""The tail: an estimate of the attention to tokens that a query does not read.

Attention over the top tokens alone drops the rest of the attention mass. Two moments of all cached keys and values say
how the logits of the rest are spread, and how values go with them; what was read is known, so it can be taken off, and
the moments of the *unread* tokens remain. A query that reads all but the lowest share of a normal distribution leaves
a normal distribution cut off from above. For unread logits x of mean m and variance v, and values y:

    s, c    of the cut normal that has this mean and this variance:  s^2 = v / (1 - a h(a) - h(a)^2),  c = m + s h(a)
    mass    = n exp(c + s^2 / 2) Phi(a - s) / Phi(a)
    value   = mean(y) + cov(y, x) / v * (c + s^2 - s h(a - s) - m)         the linear regression, where exp(x) weighs it
    output  = (sum_read e^x y + mass * value) / (sum_read e^x + mass)

with n unread tokens, h = phi / Phi, and a the standard normal quantile of their share. Four corrections of each query
head (`TailParams`) are trained to make outputs those of dense attention. The first token of a sequence, whose key and
value are like no other's, belongs to no moment: it is read, or left out.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array, Bool, Float, Int32, Shaped

NOTHING = -1e30  # the log of no mass: finite, so that differences of it are
_LEAST_VARIANCE = 1e-6
_MOST_SPREAD = 12.0  # standard deviation of logits beyond which exp of them is no estimate
_MOST_SHARE = 1 - 1e-5  # of unread tokens: the quantile stays finite
_LOG_SQRT_2PI = float(0.5 * np.log(2 * np.pi))


@flax.struct.dataclass
class Moments:
    """Mean and scatter of a KV head's cached keys and values, all but each sequence's first token, in float32.

    A scatter is the sum of products of differences from the means, so that means far from zero cost no digits.
    """

    count: Float[Array, "batch"]
    key: Float[Array, "batch kv_heads head_dim"]  # mean
    value: Float[Array, "batch kv_heads head_dim"]  # mean
    key_key: Float[Array, "batch kv_heads head_dim head_dim"]
    value_key: Float[Array, "batch kv_heads head_dim head_dim"]  # values first


@flax.struct.dataclass
class TailParams:
    """Corrections of the estimate, a row of each query head; those with two columns are a + b (quantile - 2)."""

    cut: Float[Array, "*layers q_heads two"]  # added to the quantile where unread logits are cut off
    log_mass: Float[Array, "*layers q_heads two"]  # added to the log of the mass
    spread: Float[Array, "*layers q_heads"]  # of the log mass by the logits' standard deviation
    slope: Float[Array, "*layers q_heads two"]  # factor of the difference between the value and the values' mean
    gate: Float[Array, "*layers q_heads"]  # 1, or 0 for a head that does better without the tail


@flax.struct.dataclass
class UnreadMoments:
    """What is known of unread tokens for each query head: `[batch, heads...]`, vectors with head_dim at the end."""

    count: Float[Array, "*rows"]
    mean: Float[Array, "*rows"]  # of logits
    variance: Float[Array, "*rows"]  # of logits
    value: Float[Array, "*rows head_dim"]  # mean
    covariance: Float[Array, "*rows head_dim"]  # of values with logits


def empty_moments(batch: int, kv_heads: int, head_dim: int) -> Moments:
    """Return moments of no tokens."""
    vector, matrix = (batch, kv_heads, head_dim), (batch, kv_heads, head_dim, head_dim)
    return Moments(jnp.zeros((batch,)), jnp.zeros(vector), jnp.zeros(vector), jnp.zeros(matrix), jnp.zeros(matrix))


def init_tail(layers: int, q_heads: int) -> TailParams:
    """Return corrections that change nothing: the estimate of a cut normal distribution."""
    pair, one = jnp.zeros((layers, q_heads, 2)), jnp.zeros((layers, q_heads))
    return TailParams(cut=pair, log_mass=pair, spread=one, slope=pair.at[..., 0].set(1.0), gate=jnp.ones_like(one))


def add_tokens(
    moments: Moments,
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    is_counted: Bool[Array, "batch q_len"],
) -> Moments:
    """Return moments with more tokens; chunk by chunk gives what all tokens at once give.

    Args:
        moments: of the tokens before.
        keys: after RoPE, as they are cached.
        values: of the same tokens.
        is_counted: False for padding and for the first token of a sequence.
    """
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    there = is_counted.astype(jnp.float32)
    new = there.sum(axis=1)
    total = jnp.maximum(moments.count + new, 1.0)[:, None, None]
    # differences from the means so far: those of the tokens together follow from them
    off_key = (keys - moments.key[:, None]) * there[:, :, None, None]
    off_value = (values - moments.value[:, None]) * there[:, :, None, None]
    key_sum, value_sum = off_key.sum(axis=1), off_value.sum(axis=1)

    def scatter(old: Array, left: Array, right: Array, left_sum: Array, right_sum: Array) -> Array:
        if left.shape[1] == 1:  # one token: a product with no sum
            added = left[:, 0, :, :, None] * right[:, 0, :, None, :]
        else:
            added = jnp.einsum("btki,btkj->bkij", left, right, precision="highest")
        return old + added - left_sum[..., :, None] * (right_sum / total)[..., None, :]

    return Moments(
        count=moments.count + new,
        key=moments.key + key_sum / total,
        value=moments.value + value_sum / total,
        key_key=scatter(moments.key_key, off_key, off_key, key_sum, key_sum),
        value_key=scatter(moments.value_key, off_value, off_key, value_sum, key_sum),
    )


def logit_moments(moments: Moments, queries: Float[Array, "batch kv_heads group head_dim"]) -> UnreadMoments:
    """Return the moments of all counted tokens' logits, by query head: `[batch, kv_heads, group]`."""
    scaled = queries.astype(jnp.float32) * queries.shape[-1] ** -0.5
    count = jnp.maximum(moments.count, 1.0)[:, None, None]
    turned = jnp.einsum("bkij,bkgj->bkgi", moments.key_key, scaled, precision="highest")
    covariance = jnp.einsum("bkij,bkgj->bkgi", moments.value_key, scaled, precision="highest")
    value = jnp.broadcast_to(moments.value[:, :, None], scaled.shape)
    return UnreadMoments(
        count=jnp.broadcast_to(moments.count[:, None, None], scaled.shape[:-1]),
        mean=jnp.einsum("bkd,bkgd->bkg", moments.key, scaled, precision="highest"),
        variance=jnp.sum(turned * scaled, axis=-1) / count,
        value=value,
        covariance=covariance / count[..., None],
    )


def take_off(
    whole: UnreadMoments,
    count: Float[Array, "*rows"],
    logits: Float[Array, "*rows"],
    squares: Float[Array, "*rows"],
    values: Float[Array, "*rows head_dim"],
    products: Float[Array, "*rows head_dim"],
) -> UnreadMoments:
    """Return the moments of what is left when some tokens are taken off.

    Args:
        whole: moments of all.
        count: how many are taken off.
        logits: their sum of x, the difference of a logit from the mean of all.
        squares: their sum of x^2.
        values: their sum of y, the difference of a value from the mean of all.
        products: their sum of x y.
    """
    left = whole.count - count
    n = jnp.maximum(left, 1.0)
    shift, value_shift = -logits / n, -values / n[..., None]
    variance = (whole.count * whole.variance - squares) / n - shift**2
    covariance = (whole.count[..., None] * whole.covariance - products) / n[..., None] - shift[..., None] * value_shift
    return UnreadMoments(left, whole.mean + shift, jnp.maximum(variance, 0.0), whole.value + value_shift, covariance)


def _hazard(x: Array) -> Array:
    """phi(x) / Phi(x) of the standard normal distribution."""
    return jnp.exp(-0.5 * x * x - _LOG_SQRT_2PI - log_ndtr(x))


def mass_and_slope(
    unread: UnreadMoments, total: Float[Array, "*rows"], highest: Float[Array, "*rows"], params: TailParams
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the log of the unread tokens' attention mass, and by how much of the covariance their value is moved.

    Args:
        unread: their moments; those of values are not looked at.
        total: tokens with moments, read or not.
        highest: the highest logit that was read: none of the unread is taken to be higher in the mean.
        params: of one layer; rows end with the axes of KV heads and of the query heads of each.
    """
    rows = unread.count.shape

    def by_row(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf.reshape(*rows[-2:], *leaf.shape[1:]), (*rows, *leaf.shape[1:]))

    params = jax.tree.map(by_row, params)
    share = jnp.clip(unread.count / jnp.maximum(total, 1.0), 0.5, _MOST_SHARE)
    quantile = ndtri(share)
    past = quantile - 2.0
    cut = quantile + params.cut[..., 0] + past * params.cut[..., 1]
    hazard = _hazard(cut)
    variance = jnp.maximum(unread.variance, _LEAST_VARIANCE)
    kept = jnp.maximum(1 - cut * hazard - hazard * hazard, 0.05)  # of a normal variable's variance, below the cut
    spread = jnp.minimum(jnp.sqrt(variance / kept), _MOST_SPREAD)
    centre = unread.mean + spread * hazard
    log_count = jnp.log(jnp.maximum(unread.count, 0.5))
    log_mass = log_count + centre + 0.5 * spread**2 + log_ndtr(cut - spread) - log_ndtr(cut)
    log_mass = log_mass + params.log_mass[..., 0] + past * params.log_mass[..., 1]
    log_mass = log_mass + params.spread * jnp.minimum(jnp.sqrt(variance), _MOST_SPREAD)
    shift = centre + spread**2 - spread * _hazard(cut - spread) - unread.mean
    slope = (params.slope[..., 0] + past * params.slope[..., 1]) * shift / variance
    log_mass = jnp.minimum(log_mass, log_count + highest)
    is_there = (unread.count > 0.5) & (params.gate > 0) & jnp.isfinite(log_mass) & jnp.isfinite(slope)
    return jnp.where(is_there, log_mass, NOTHING), jnp.where(is_there, slope, 0.0)


def estimate(
    unread: UnreadMoments, total: Float[Array, "*rows"], highest: Float[Array, "*rows"], params: TailParams
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows head_dim"]]:
    """Return the log of the unread tokens' attention mass, and their mean value under it; args as `mass_and_slope`."""
    log_mass, slope = mass_and_slope(unread, total, highest, params)
    value = unread.value + unread.covariance * slope[..., None]
    is_there = (log_mass > NOTHING) & jnp.isfinite(value).all(axis=-1)
    return jnp.where(is_there, log_mass, NOTHING), jnp.where(is_there[..., None], value, 0.0)


@flax.struct.dataclass
class Split:
    """Attention of some queries in two parts: what they read, and the moments of what they do not."""

    read: Float[Array, "*rows head_dim"]  # softmax-weighted mean of the values read
    log_read: Float[Array, "*rows"]  # log of the sum of exponentials of the logits read
    highest: Float[Array, "*rows"]  # logit read
    unread: UnreadMoments
    total: Float[Array, "*rows"]  # tokens with moments, read or not


def split_by_logits(
    logits: Float[Array, "batch kv_heads group q_len kv_len"],
    mask: Bool[Array, "batch kv_heads group q_len kv_len"],
    values: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
) -> Split:
    """Return what moments in a cache would give, from all logits: for many queries at once, each with its own past.

    Args:
        logits: scaled, of all tokens; those after a query's position are not looked at.
        mask: which tokens each query reads.
        values: of all tokens.
        positions: of the queries.

    Returns: rows `[batch, q_len, kv_heads, group]`.
    """
    slots = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :]
    seen = ((slots > 0) & (slots <= positions[:, :, None]))[:, None, None]
    unread = (seen & ~mask).astype(jnp.float32)
    count = unread.sum(axis=-1)
    n = jnp.maximum(count, 1.0)
    mean = jnp.sum(unread * logits, axis=-1) / n
    off = unread * (logits - mean[..., None])
    masked = jnp.where(mask, logits, NOTHING)
    highest = masked.max(axis=-1)
    weights = jnp.exp(masked - highest[..., None])
    sums = weights.sum(axis=-1)

    def mix(rows: Array) -> Array:
        mixed = jnp.einsum("bkgts,bskd->bkgtd", rows.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return jnp.moveaxis(mixed, 3, 1)

    def turn(rows: Array) -> Array:
        return jnp.moveaxis(rows, 3, 1)

    def over(rows: Array, numbers: Array) -> Array:
        return rows / turn(numbers)[..., None]

    return Split(
        read=over(mix(weights), sums),
        log_read=turn(highest + jnp.log(sums)),
        highest=turn(highest),
        unread=UnreadMoments(
            count=turn(count),
            mean=turn(mean),
            variance=turn(jnp.sum(off * off, axis=-1) / n),
            value=over(mix(unread), n),
            covariance=over(mix(off), n),
        ),
        total=jnp.broadcast_to(positions[:, :, None, None].astype(jnp.float32), turn(count).shape),
    )


def attend_by_logits(
    logits: Float[Array, "batch kv_heads group q_len kv_len"],
    mask: Bool[Array, "batch kv_heads group q_len kv_len"],
    values: Shaped[Array, "batch kv_len kv_heads head_dim"],
    positions: Int32[Array, "batch q_len"],
    params: TailParams,
) -> Float[Array, "batch kv_heads group q_len head_dim"]:
    """Return attention over the mask and an estimate of it over the rest; args as `split_by_logits`."""
    split = split_by_logits(logits, mask, values, positions)
    log_mass, value = estimate(split.unread, split.total, split.highest, params)
    return jnp.moveaxis(join(split.read, split.log_read, value, log_mass)[0], 1, 3)


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


def counted(positions: Int32[Array, "batch q_len"], ends: Int32[Array, "batch"]) -> Bool[Array, "batch q_len"]:
    """Return which tokens have moments: all below a sequence's end but its first."""
    return (positions > 0) & (positions < ends[:, None])


def moment_bytes(kv_heads: int, head_dim: int) -> int:
    """Return the bytes of one layer's moments of one sequence."""
    return 4 * (1 + kv_heads * (2 * head_dim + 2 * head_dim**2))
