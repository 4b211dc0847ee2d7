"""Hash functions whose bits are the signs of trained networks.

* ``asymmetric``: a query stays a vector of real bit weights.
* ``symmetric`` (Spotlight Attention, arXiv 2508.19740): one network hashes queries and keys; both sides are bits. The
  paper's popcount(XNOR) is the case of weights +-1, up to a constant per query.
"""

import dataclasses
import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Shaped

from spotlight_jax.config.hashing import NetworkConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HashFunctions, HeadShape, Sample, orthogonal_planes, sum_groups
from spotlight_jax.selector.fitting import Moments
from spotlight_jax.weights import WeightBounds, real_bounds

RANDOM_START = 0.001  # standard deviation of the paper's initial weights


@flax.struct.dataclass
class HashNetwork:
    """Two layers and, for the rotation skip, the rotation; stacked over layers and heads."""

    hidden_kernel: Float[Array, "*layers heads head_dim hidden"]
    hidden_bias: Float[Array, "*layers heads hidden"]
    out_kernel: Float[Array, "*layers heads hidden code_bits"]
    out_bias: Float[Array, "*layers heads code_bits"]
    rotation: Float[Array, "*layers heads head_dim code_bits"] | None


@flax.struct.dataclass
class NetworkWeights:
    """All that is trained of the forms with networks."""

    keys: HashNetwork
    queries: HashNetwork | None  # None: the symmetric form, which hashes queries with `keys`
    log_head_scale: Float[Array, "*layers q_heads"] | None  # asymmetric: scale of a head's scores in its group's sum


@flax.struct.dataclass
class KeyStats:
    """Mean of post-RoPE keys and scale of each dimension: measured once, never trained."""

    mean: Float[Array, "*layers kv_heads head_dim"]
    scale: Float[Array, "*layers kv_heads head_dim"]


@flax.struct.dataclass
class NetworkHash(HashFunctions):
    """Hash functions of the forms with networks."""

    weights: NetworkWeights
    stats: KeyStats
    cfg: NetworkConfig = flax.struct.field(pytree_node=False)

    @property
    def is_symmetric(self) -> bool:
        """Whether queries become bits too."""
        return self.weights.queries is None

    @property
    def fitted_to(self) -> Literal["nothing", "moments"]:  # type: ignore[override]
        """Keys as they are need nothing of text."""
        return "moments" if self.cfg.centre else "nothing"

    def fit(self, sample: Sample) -> "NetworkHash":
        """Measure where networks see keys (`balance`); keys that are not centred stay as they are."""
        return dataclasses.replace(self, stats=balance(sample.moments)) if self.cfg.centre else self

    def hash_keys(self, keys: Shaped[Array, "*batch kv_heads head_dim"]) -> Float[Array, "*batch code_heads code_bits"]:
        """Return a network's outputs for centred keys; see `HashFunctions.hash_keys`."""
        keys, lead = keys.astype(jnp.float32), (1,) * (keys.ndim - 2)
        if self.cfg.centre:
            mean, scale = (leaf.reshape(*lead, *leaf.shape) for leaf in (self.stats.mean, self.stats.scale))
            keys = (keys - mean) / scale
        return _apply_network(self.weights.keys, keys, self.cfg)

    def hash_queries(
        self, queries: Shaped[Array, "*batch q_heads head_dim"]
    ) -> Float[Array, "*batch q_heads code_bits"]:
        """Return each query head's bit weights times its scale, or its code before the sign (symmetric).

        Centred keys are (k - mean) / scale, so q . k ranks keys as (q * scale) . centred k does. Queries are brought to
        unit root mean square there, each group as a whole: no rank changes, of a head or of its group's sum.
        """
        queries, lead = queries.astype(jnp.float32), (1,) * (queries.ndim - 2)
        kv_heads, head_dim = self.stats.mean.shape
        if self.cfg.centre:
            grouped = queries.reshape(*queries.shape[:-2], kv_heads, -1, head_dim)
            grouped = grouped * self.stats.scale.reshape(*lead, kv_heads, 1, head_dim)
            grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True) + 1e-12)
            queries = grouped.reshape(queries.shape)
        if self.weights.queries is None:
            return _apply_network(self.weights.keys, queries, self.cfg)
        outputs = _apply_network(self.weights.queries, queries, self.cfg)
        assert self.weights.log_head_scale is not None, "only the symmetric form has no scales"
        return outputs * jnp.exp(self.weights.log_head_scale).reshape(*lead, -1, 1)

    def score_heads(
        self, outputs: Float[Array, "*batch q_heads code_bits"], per_kv_head: bool
    ) -> Float[Array, "*batch heads one code_bits"]:
        """Return signs (symmetric) or real weights, summed over a group; see `HashFunctions.score_heads`."""
        if self.is_symmetric:
            outputs = jnp.where(outputs > 0, 1.0, -1.0)
        return (sum_groups(outputs, self.kv_heads) if per_kv_head else outputs)[..., None, :]

    def soft_codes(
        self, keys: Shaped[Array, "kv_len kv_heads head_dim"], gamma: Float[Array, ""]
    ) -> Float[Array, "kv_len code_heads code_bits"]:
        """Return soft signs; see `HashFunctions.soft_codes`."""
        return soft_sign(self.hash_keys(keys), gamma)

    def soft_weights(
        self, queries: Shaped[Array, "q_len q_heads head_dim"], gamma: Float[Array, ""], per_kv_head: bool
    ) -> Float[Array, "q_len heads one code_bits"]:
        """Return soft signs (symmetric) or real weights; see `HashFunctions.soft_weights`."""
        outputs = self.hash_queries(queries)
        if not self.is_symmetric:
            return self.score_heads(outputs, per_kv_head)
        soft = soft_sign(outputs, gamma)
        return (sum_groups(soft, self.kv_heads) if per_kv_head else soft)[..., None, :]

    def integer_weights(
        self, outputs: Float[Array, "batch q_len q_heads code_bits"], per_kv_head: bool
    ) -> Int32[Array, "batch q_len heads one code_bits"]:
        """Return sums of +-1 as they are (symmetric), others rounded; see `HashFunctions.integer_weights`."""
        if self.is_symmetric:
            return self.score_heads(outputs, per_kv_head).astype(jnp.int32)
        return super().integer_weights(outputs, per_kv_head)

    def weight_bounds(self, group: int, per_kv_head: bool) -> WeightBounds:
        """See `HashFunctions.weight_bounds`."""
        if not self.is_symmetric:
            return real_bounds(self.cfg.code_bits)
        return sign_bounds(self.cfg.code_bits, group if per_kv_head else 1)

    def adds_scores(self, per_kv_head: bool) -> bool:
        """Whether each query head has a code of its own; see `HashFunctions.adds_scores`."""
        return per_kv_head and self.cfg.code_heads == "query"


def _init_network(
    key: PRNGKeyArray, heads: int, head_dim: int, cfg: NetworkConfig, planes: Float[Array, "heads head_dim code_bits"]
) -> HashNetwork:
    """Draw one layer's network at its start."""
    hidden_key, out_key = jax.random.split(key)
    hidden_kernel = jax.random.normal(hidden_key, (heads, head_dim, cfg.hidden))
    out_shape = (heads, cfg.hidden, cfg.code_bits)
    if cfg.skip == "rotation":
        hidden_kernel = hidden_kernel / jnp.sqrt(head_dim)
        out_kernel = jnp.zeros(out_shape)
    else:
        hidden_kernel = hidden_kernel * RANDOM_START
        out_kernel = jax.random.normal(out_key, out_shape) * RANDOM_START
    return HashNetwork(
        hidden_kernel=hidden_kernel,
        hidden_bias=jnp.zeros((heads, cfg.hidden)),
        out_kernel=out_kernel,
        out_bias=jnp.zeros((heads, cfg.code_bits)),
        rotation=planes if cfg.skip == "rotation" else None,
    )


def check_widths(cfg: NetworkConfig, shape: HeadShape) -> None:
    """Raise InputError where `skip="layers"` meets widths that its identities cannot bridge."""
    if cfg.skip == "layers" and not cfg.hidden == cfg.code_bits == shape.head_dim:
        raise InputError(
            f"skip 'layers' adds identities, so hidden ({cfg.hidden}), code_bits ({cfg.code_bits}) and the model's "
            f"head_dim ({shape.head_dim}) must be equal; use skip 'none' or 'rotation'"
        )


def init_layer(key: PRNGKeyArray, cfg: NetworkConfig, shape: HeadShape) -> NetworkHash:
    """Draw one layer, with statistics that change nothing."""
    code_heads = shape.kv_heads if cfg.code_heads == "kv" else shape.q_heads
    plane_key, keys_key, queries_key = jax.random.split(key, 3)
    planes = orthogonal_planes(plane_key, code_heads, shape.head_dim, cfg.code_bits)
    keys, queries, log_scale = _init_network(keys_key, code_heads, shape.head_dim, cfg, planes), None, None
    if cfg.form == "asymmetric":
        shared = jnp.repeat(planes, shape.group, axis=0)
        queries = _init_network(queries_key, shape.q_heads, shape.head_dim, cfg, shared)
        log_scale = jnp.full((shape.q_heads,), -0.5 * math.log(cfg.code_bits / 16), jnp.float32)
    size = (shape.kv_heads, shape.head_dim)
    return NetworkHash(NetworkWeights(keys, queries, log_scale), KeyStats(jnp.zeros(size), jnp.ones(size)), cfg)


def _apply_network(
    net: HashNetwork, x: Float[Array, "*batch x_heads head_dim"], cfg: NetworkConfig
) -> Float[Array, "*batch heads code_bits"]:
    """Apply networks up to their signs. Query head h meets KV head h // group, whichever side has more heads."""
    net_heads, x_heads = net.hidden_bias.shape[0], x.shape[-2]
    pairs = min(net_heads, x_heads)  # p: paired heads; a: inputs per network; n: networks per input
    x = x.reshape(*x.shape[:-2], pairs, x_heads // pairs, x.shape[-1])
    net = jax.tree.map(lambda leaf: leaf.reshape(pairs, net_heads // pairs, *leaf.shape[1:]), net)
    out = jax.nn.silu(_multiply(x[..., None, :], net.hidden_kernel) + _rowed(net.hidden_bias, x))
    if cfg.skip == "layers":
        out = out + x[..., None, :]
    result = _multiply(out, net.out_kernel) + _rowed(net.out_bias, x)
    if cfg.skip == "layers":
        result = result + out
    if net.rotation is not None:
        result = result + _multiply(x[..., None, :], net.rotation)
    return result.reshape(*x.shape[:-3], max(net_heads, x_heads), result.shape[-1])


def _multiply(
    x: Float[Array, "*batch pairs inputs _ width"], kernel: Float[Array, "pairs nets width out"]
) -> Float[Array, "*batch pairs inputs nets out"]:
    """Multiply each input by each network of its pair; x has one row per network, or one row for all of them."""
    if kernel.shape[1] == 1:  # an axis of size 1 before the contracted one makes XLA for CPUs copy the kernel each time
        return jnp.einsum("...pai,pio->...pao", x[..., 0, :], kernel[:, 0])[..., None, :]
    if x.shape[-2] == 1:
        return jnp.einsum("...pai,pnio->...pano", x[..., 0, :], kernel)
    return jnp.einsum("...pani,pnio->...pano", x, kernel)


def _rowed(
    bias: Float[Array, "pairs nets width"], x: Float[Array, "*batch pairs inputs head_dim"]
) -> Float[Array, "*ones pairs one nets width"]:
    """Return a bias with the axes it is broadcast over written out."""
    return bias[:, None].reshape((1,) * (x.ndim - 3) + (bias.shape[0], 1, *bias.shape[1:]))


def balance(moments: Moments) -> KeyStats:
    """Return where networks see keys: centred, scaled so that both sides of the dot product have equal spreads.

    A code spends its bits on a dimension as its spread says, but what a dimension adds to the spread of q . k is the
    product of both sides'. With scale^2 = spread of keys / spread of the group's summed queries, centred keys / scale
    and queries * scale have equal spreads, q . k is what it was, and no bits go to dimensions that decide nothing.
    Scaled keys have a mean square of 1.
    """
    key_spread = jnp.maximum(jnp.sqrt(jnp.diagonal(moments.covariance, axis1=-2, axis2=-1)), 1e-6)
    scale = jnp.sqrt(key_spread / jnp.maximum(jnp.sqrt(moments.summed), 1e-6))
    mean_square = jnp.mean(jnp.square(key_spread / scale), axis=-1, keepdims=True)
    return KeyStats(mean=moments.mean, scale=scale * jnp.sqrt(mean_square))


def soft_sign(x: Float[Array, "*shape"], gamma: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """Return a differentiable sign: gamma x / (1 + gamma |x|), the paper's; tends to the sign as gamma grows."""
    return gamma * x / (1 + gamma * jnp.abs(x))


def sign_bounds(code_bits: int, summed: int = 1) -> WeightBounds:
    """Return the bounds of weights that are sums of so many signs."""
    return WeightBounds(summed, summed * code_bits)


def orthogonal_lsh(key: PRNGKeyArray, code_bits: int, shape: HeadShape, centre: bool = False) -> NetworkHash:
    """Draw random rotations, the same for queries and keys, whose signs are the bits: the baseline without training."""
    cfg = NetworkConfig("symmetric", code_bits, skip="rotation", hidden=1, centre=centre)
    return jax.vmap(lambda layer_key: init_layer(layer_key, cfg, shape))(jax.random.split(key, shape.layers))
