"""Hash functions: one small network per attention head turns keys and queries into binary codes.

Two forms share one network, one scoring rule and one code layout:

* ``symmetric`` (Spotlight Attention, arXiv 2508.19740): the same function hashes queries and keys; both sides are bits.
* ``asymmetric``: keys become bits, one code per KV head and token; a query stays a vector of real bit weights, one per
  query head, quantised to a few bits at inference.

Either way the score of a token is sum_b weight_b * bit_b; the paper's popcount(XNOR) is the case weight_b = +-1, up to
a constant per query. Everything here is a pure function of a params tree whose leaves lead with a layer axis.
"""

import dataclasses
import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Shaped, UInt32

from spotlight_jax.errors import InputError

WORD_BITS = 32
RANDOM_START = 0.001  # standard deviation of the paper's initial weights


@dataclasses.dataclass(frozen=True)
class HashConfig:
    """What kind of hash function each head has."""

    form: Literal["symmetric", "asymmetric"] = "asymmetric"
    """symmetric: queries and keys share a function and both become bits (the paper); asymmetric: real query weights."""
    skip: Literal["none", "layers", "rotation"] = "rotation"
    """What runs beside the network: nothing (the paper), an identity around each of its two layers (the released code),
    or a trained rotation with the network's last layer at zero, so that step 0 is orthogonal LSH."""
    code_bits: int = 128
    """Bits per code, a multiple of 32 from 32 to 256."""
    hidden: int = 128
    """Width of the network's hidden layer."""
    code_heads: Literal["kv", "query"] = "kv"
    """One key code per KV head, or one per query head (the paper)."""
    weight_bits: int = 4
    """Bits of a query weight at inference, 2 to 8 (asymmetric form): fewer score and select faster. 8 lose nothing,
    4 about .001 of the attention mass read (docs/lab-notes.md)."""
    centre: bool = True
    """Hash keys relative to their mean, each dimension scaled so that its spread is equal on both sides of the dot
    product (measured on the first training window), instead of keys and queries as they are."""

    def __post_init__(self) -> None:
        """Refuse what no hash function can be built from."""
        if self.code_bits % WORD_BITS or not 32 <= self.code_bits <= 256:
            raise InputError(f"code_bits is {self.code_bits}; give a multiple of 32 from 32 to 256")
        if not 2 <= self.weight_bits <= 8:
            raise InputError(f"weight_bits is {self.weight_bits}; give 2 to 8")
        if self.hidden < 1:
            raise InputError(f"hidden is {self.hidden}; give a width of at least 1")
        if self.form == "asymmetric" and self.code_heads == "query":
            raise InputError("the asymmetric form keeps one code per KV head; give --hash.code-heads kv")

    @property
    def is_default_form(self) -> bool:
        """Whether it is the form that kernels are written for: real query weights, rotations, centred keys."""
        return self.form == "asymmetric" and self.skip == "rotation" and self.centre

    @property
    def words(self) -> int:
        """Number of uint32 words of a packed code."""
        return self.code_bits // WORD_BITS


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """The attention heads a selector serves."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads


@flax.struct.dataclass
class HashNetwork:
    """Two layers and, for the rotation skip, the rotation; stacked over layers and heads."""

    hidden_kernel: Float[Array, "*layers heads head_dim hidden"]
    hidden_bias: Float[Array, "*layers heads hidden"]
    out_kernel: Float[Array, "*layers heads hidden code_bits"]
    out_bias: Float[Array, "*layers heads code_bits"]
    rotation: Float[Array, "*layers heads head_dim code_bits"] | None


@flax.struct.dataclass
class HashWeights:
    """All that is trained."""

    keys: HashNetwork
    queries: HashNetwork | None  # None: the symmetric form, which hashes queries with `keys`
    log_gain: Float[Array, "*layers q_heads"] | None  # scale of the asymmetric scores: their say in a group's sum


@flax.struct.dataclass
class KeyStats:
    """Where post-RoPE keys lie and how dimensions are scaled: measured once, never trained."""

    mean: Float[Array, "*layers kv_heads head_dim"]
    scale: Float[Array, "*layers kv_heads head_dim"]


@flax.struct.dataclass
class HashParams:
    """A selector: what was trained, and the statistics it was trained around."""

    weights: HashWeights
    stats: KeyStats


def orthogonal_planes(
    key: PRNGKeyArray, heads: int, head_dim: int, code_bits: int
) -> Float[Array, "heads head_dim code_bits"]:
    """Unit-norm columns of as many independent random rotations as `code_bits` needs: orthogonal LSH."""
    blocks = -(-code_bits // head_dim)
    rotations = jax.random.orthogonal(key, head_dim, shape=(heads, blocks), dtype=jnp.float32)
    return jnp.moveaxis(rotations, 1, 2).reshape(heads, head_dim, blocks * head_dim)[..., :code_bits]


def _init_network(
    key: PRNGKeyArray, heads: int, head_dim: int, cfg: HashConfig, planes: Float[Array, "heads head_dim code_bits"]
) -> HashNetwork:
    """One layer's network at its start."""
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


def check_widths(cfg: HashConfig, shape: HeadShape) -> None:
    """Raise InputError where `skip="layers"` meets widths that its identities cannot bridge."""
    if cfg.skip == "layers" and not cfg.hidden == cfg.code_bits == shape.head_dim:
        raise InputError(
            f"skip 'layers' adds identities, so hidden ({cfg.hidden}), code_bits ({cfg.code_bits}) and the model's "
            f"head_dim ({shape.head_dim}) must be equal; use skip 'none' or 'rotation'"
        )


def init_params(key: PRNGKeyArray, cfg: HashConfig, shape: HeadShape) -> HashParams:
    """Params of every layer at step 0, with statistics that change nothing (see `fit_stats`).

    Raises: InputError as `check_widths`.
    """
    check_widths(cfg, shape)
    code_heads = shape.kv_heads if cfg.code_heads == "kv" else shape.q_heads

    def init_layer(layer_key: PRNGKeyArray) -> HashWeights:
        plane_key, keys_key, queries_key = jax.random.split(layer_key, 3)
        planes = orthogonal_planes(plane_key, code_heads, shape.head_dim, cfg.code_bits)
        keys = _init_network(keys_key, code_heads, shape.head_dim, cfg, planes)
        if cfg.form == "symmetric":
            return HashWeights(keys=keys, queries=None, log_gain=None)
        shared = jnp.repeat(planes, shape.group, axis=0)
        queries = _init_network(queries_key, shape.q_heads, shape.head_dim, cfg, shared)
        gain = jnp.full((shape.q_heads,), -0.5 * math.log(cfg.code_bits / 16), jnp.float32)
        return HashWeights(keys=keys, queries=queries, log_gain=gain)

    stats_shape = (shape.layers, shape.kv_heads, shape.head_dim)
    return HashParams(
        weights=jax.vmap(init_layer)(jax.random.split(key, shape.layers)),
        stats=KeyStats(mean=jnp.zeros(stats_shape), scale=jnp.ones(stats_shape)),
    )


def sum_groups(x: Shaped[Array, "*batch q_heads width"], kv_heads: int) -> Shaped[Array, "*batch kv_heads width"]:
    """Sum over the query heads of each KV head."""
    return jnp.sum(x.reshape(*x.shape[:-2], kv_heads, -1, x.shape[-1]), axis=-2)


def fit_stats(
    keys: Shaped[Array, "*layers batch kv_len kv_heads head_dim"],
    queries: Shaped[Array, "*layers batch q_len q_heads head_dim"],
) -> KeyStats:
    """Mean of post-RoPE keys and the scale of each dimension, per layer and KV head.

    A code spends its bits on a dimension as its spread says, but what a dimension adds to the spread of q . k is the
    product of both sides'. With scale^2 = spread of keys / spread of the group's summed queries, centred keys / scale
    and queries * scale have equal spreads, q . k is what it was, and no bits go to dimensions that decide nothing.
    Scaled keys have a mean square of 1.
    """
    keys, queries = keys.astype(jnp.float32), queries.astype(jnp.float32)
    summed = sum_groups(queries, keys.shape[-2])
    key_spread = jnp.maximum(jnp.std(keys, axis=(-4, -3)), 1e-6)
    query_spread = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(summed), axis=(-4, -3))), 1e-6)
    scale = jnp.sqrt(key_spread / query_spread)
    mean_square = jnp.mean(jnp.square(key_spread / scale), axis=-1, keepdims=True)
    return KeyStats(mean=jnp.mean(keys, axis=(-4, -3)), scale=scale * jnp.sqrt(mean_square))


def layer_params(params: HashParams, layer: int) -> HashParams:
    """One layer's params, without the layer axis."""
    return jax.tree.map(lambda leaf: leaf[layer], params)


def _apply_network(
    net: HashNetwork, x: Float[Array, "*batch x_heads head_dim"], cfg: HashConfig
) -> Float[Array, "*batch heads code_bits"]:
    """The hash function before its sign. Query head h meets KV head h // group, whichever side has more heads."""
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
    """Each input times each network of its pair; x has one row per network, or one row for all of them."""
    if kernel.shape[1] == 1:  # an axis of size 1 before the contracted one makes XLA for CPUs copy the kernel each time
        return jnp.einsum("...pai,pio->...pao", x[..., 0, :], kernel[:, 0])[..., None, :]
    if x.shape[-2] == 1:
        return jnp.einsum("...pai,pnio->...pano", x[..., 0, :], kernel)
    return jnp.einsum("...pani,pnio->...pano", x, kernel)


def _rowed(
    bias: Float[Array, "pairs nets width"], x: Float[Array, "*batch pairs inputs head_dim"]
) -> Float[Array, "*ones pairs one nets width"]:
    """A bias with the axes it is broadcast over written out."""
    return bias[:, None].reshape((1,) * (x.ndim - 3) + (bias.shape[0], 1, *bias.shape[1:]))


def hash_keys(
    params: HashParams, keys: Shaped[Array, "*batch kv_heads head_dim"], cfg: HashConfig
) -> Float[Array, "*batch code_heads code_bits"]:
    """One layer's key side before the sign: bit b of a key is 1 where the result is > 0."""
    keys = keys.astype(jnp.float32)
    if cfg.centre:
        lead = (1,) * (keys.ndim - 2)
        mean, scale = (leaf.reshape(*lead, *leaf.shape) for leaf in (params.stats.mean, params.stats.scale))
        keys = (keys - mean) / scale
    return _apply_network(params.weights.keys, keys, cfg)


def hash_queries(
    params: HashParams, queries: Shaped[Array, "*batch q_heads head_dim"], cfg: HashConfig
) -> Float[Array, "*batch q_heads code_bits"]:
    """One layer's query side: its bit weights times their gain (asymmetric), or its code before the sign (symmetric).

    Centred keys are (k - mean) / scale, so q . k ranks keys as (q * scale) . centred k does. Queries are brought to
    unit root mean square there, each group as a whole: no rank changes, of a query head or of its group's sum.
    """
    queries = queries.astype(jnp.float32)
    if cfg.centre:
        kv_heads, head_dim = params.stats.scale.shape
        grouped = queries.reshape(*queries.shape[:-2], kv_heads, -1, head_dim)
        scale = params.stats.scale.reshape(*(1,) * (queries.ndim - 2), kv_heads, 1, head_dim)
        grouped = grouped * scale
        grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True) + 1e-12)
        queries = grouped.reshape(queries.shape)
    if params.weights.queries is None or params.weights.log_gain is None:
        return _apply_network(params.weights.keys, queries, cfg)
    gain = jnp.exp(params.weights.log_gain).reshape((1,) * (queries.ndim - 2) + (-1, 1))
    return _apply_network(params.weights.queries, queries, cfg) * gain


def soft_sign(x: Float[Array, "*shape"], gamma: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """Differentiable sign: gamma x / (1 + gamma |x|), the paper's; tends to the sign as gamma grows."""
    return gamma * x / (1 + gamma * jnp.abs(x))


def pack_bits(bits: Bool[Array, "*batch code_bits"]) -> UInt32[Array, "*batch words"]:
    """Bit b of a code goes to bit b % 32 of word b // 32."""
    words = bits.reshape(*bits.shape[:-1], -1, WORD_BITS).astype(jnp.uint32)
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * (words.ndim - 1) + (WORD_BITS,))
    return jnp.sum(words << places, axis=-1, dtype=jnp.uint32)


def unpack_bits(words: UInt32[Array, "*batch words"]) -> Bool[Array, "*batch code_bits"]:
    """The bits that `pack_bits` packed."""
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * words.ndim + (WORD_BITS,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    return bits.astype(bool).reshape(*words.shape[:-1], -1)


def key_codes(
    params: HashParams, keys: Shaped[Array, "batch kv_len kv_heads head_dim"], cfg: HashConfig
) -> UInt32[Array, "batch code_heads words kv_len"]:
    """One layer's packed key codes, word-major: what the cache stores and scoring streams."""
    return jnp.moveaxis(pack_bits(hash_keys(params, keys, cfg) > 0), 1, -1)


def query_weights(
    params: HashParams,
    queries: Shaped[Array, "batch q_len q_heads head_dim"],
    cfg: HashConfig,
    per_kv_head: bool = False,
) -> Int32[Array, "batch q_len heads code_bits"]:
    """One layer's integer bit weights; see `integer_weights`."""
    return integer_weights(hash_queries(params, queries, cfg), params.stats.scale.shape[0], cfg, per_kv_head)


def integer_weights(
    outputs: Float[Array, "batch q_len q_heads code_bits"], kv_heads: int, cfg: HashConfig, per_kv_head: bool
) -> Int32[Array, "batch q_len heads code_bits"]:
    """Bit weights from `hash_queries`: +-1 for the symmetric form, of `weight_bits` for the asymmetric.

    per_kv_head: sum the weights over each group first, for one selection per KV head; needs one code per KV head.
    """
    if cfg.form == "symmetric":
        weights = jnp.where(outputs > 0, 1, -1).astype(jnp.int32)
        return sum_groups(weights, kv_heads) if per_kv_head else weights
    if per_kv_head:
        outputs = sum_groups(outputs, kv_heads)
    largest = jnp.max(jnp.abs(outputs), axis=-1, keepdims=True)
    return jnp.round(outputs * (_largest_weight(cfg) / jnp.maximum(largest, 1e-30))).astype(jnp.int32)


def _largest_weight(cfg: HashConfig) -> int:
    return 2 ** (cfg.weight_bits - 1) - 1


def weight_limit(cfg: HashConfig, group: int, per_kv_head: bool) -> int:
    """Largest magnitude `query_weights` can give: what bounds scores and the number of bit planes."""
    if cfg.form == "asymmetric":
        return _largest_weight(cfg)
    return group if per_kv_head else 1
