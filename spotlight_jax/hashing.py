"""Hash functions: keys become binary codes, queries become weights of the bits.

Three forms share one scoring rule (`weights`) and one code layout:

* ``transform`` (default): a key's code holds its coordinates on axes that were fitted to text, in fixed point with as
  many bits each as its variance deserves (`fitting`). Queries are linear maps, and learn how bits count.
* ``asymmetric``: bits are the signs of a trained network; a query stays a vector of real bit weights.
* ``symmetric`` (Spotlight Attention, arXiv 2508.19740): one network hashes queries and keys; both sides are bits. The
  paper's popcount(XNOR) is the case of weights +-1, up to a constant per query.

Everything here is a pure function of a params tree whose leaves lead with a layer axis.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Shaped, UInt32

from spotlight_jax import transform
from spotlight_jax.bits import pack_bits
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.errors import InputError
from spotlight_jax.weights import WeightBounds, quantise, real_bounds

_MOST_HEADS = 2**12  # and layers, and dimensions of a head: far above any model's
RANDOM_START = 0.001  # standard deviation of the paper's initial weights


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """The attention heads a selector serves."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Refuse what no model has."""
        for field in dataclasses.fields(self):
            if not 1 <= getattr(self, field.name) <= _MOST_HEADS:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; give 1 to {_MOST_HEADS}")
        if self.q_heads % self.kv_heads:
            raise InputError(f"{self.q_heads} query heads are not a multiple of {self.kv_heads} KV heads")

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
class NetworkWeights:
    """All that is trained of the forms with networks."""

    keys: HashNetwork
    queries: HashNetwork | None  # None: the symmetric form, which hashes queries with `keys`
    log_gain: Float[Array, "*layers q_heads"] | None  # scale of the asymmetric scores: their say in a group's sum


@flax.struct.dataclass
class KeyStats:
    """Where post-RoPE keys lie and how dimensions are scaled: measured once, never trained."""

    mean: Float[Array, "*layers kv_heads head_dim"]
    scale: Float[Array, "*layers kv_heads head_dim"]


@flax.struct.dataclass
class TransformWeights:
    """All that is trained of the transform form."""

    decode: Float[Array, "*layers kv_heads head_dim code_bits"]  # what a bit is worth, by the query
    log_gain: Float[Array, "*layers q_heads"]  # a query head's say in its sum


Weights = NetworkWeights | TransformWeights  # all that is trained


@flax.struct.dataclass
class Coder:
    """The key side of the transform form: fitted once, never trained.

    Bit b of a key is a binary digit of the coordinate u = (key - mean) . axes_b + 1/2, which is cut off at 0 and 1: the
    lowest digit of ceil(cells_b u) - 1, where cells are 2 for the first digit and twice as many for each one after it.
    """

    mean: Float[Array, "*layers kv_heads head_dim"]
    axes: Float[Array, "*layers kv_heads head_dim code_bits"]
    cells: Float[Array, "*layers kv_heads code_bits"]
    members: Float[Array, "*layers kv_heads sums group"]  # 1 where a query head is part of a sum


@flax.struct.dataclass
class HashParams:
    """A selector: what is trained, and what was measured of text before."""

    weights: Weights
    stats: KeyStats | Coder

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.stats.mean.shape[-2]


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
    """Params of every layer before anything is known of keys (see `fitting`).

    Raises: InputError as `check_widths`.
    """
    check_widths(cfg, shape)
    init = _init_transform if cfg.form == "transform" else _init_networks
    return jax.vmap(lambda layer_key: init(layer_key, cfg, shape))(jax.random.split(key, shape.layers))


def _init_networks(key: PRNGKeyArray, cfg: HashConfig, shape: HeadShape) -> HashParams:
    """One layer, with statistics that change nothing."""
    code_heads = shape.kv_heads if cfg.code_heads == "kv" else shape.q_heads
    plane_key, keys_key, queries_key = jax.random.split(key, 3)
    planes = orthogonal_planes(plane_key, code_heads, shape.head_dim, cfg.code_bits)
    keys, queries, gain = _init_network(keys_key, code_heads, shape.head_dim, cfg, planes), None, None
    if cfg.form == "asymmetric":
        shared = jnp.repeat(planes, shape.group, axis=0)
        queries = _init_network(queries_key, shape.q_heads, shape.head_dim, cfg, shared)
        gain = jnp.full((shape.q_heads,), -0.5 * math.log(cfg.code_bits / 16), jnp.float32)
    size = (shape.kv_heads, shape.head_dim)
    return HashParams(NetworkWeights(keys, queries, gain), KeyStats(jnp.zeros(size), jnp.ones(size)))


def _init_transform(key: PRNGKeyArray, cfg: HashConfig, shape: HeadShape) -> HashParams:
    """One layer: signs on random axes, orthogonal LSH, and all query heads in each sum."""
    planes = orthogonal_planes(key, shape.kv_heads, shape.head_dim, cfg.code_bits)
    coder = Coder(
        mean=jnp.zeros((shape.kv_heads, shape.head_dim)),
        axes=planes,
        cells=jnp.full((shape.kv_heads, cfg.code_bits), 2.0),
        members=jnp.ones((shape.kv_heads, min(cfg.sums, shape.group), shape.group)),
    )
    decode = jnp.copy(planes)  # a training step donates both
    return HashParams(TransformWeights(decode=decode, log_gain=jnp.zeros((shape.q_heads,))), coder)


def sum_groups(x: Shaped[Array, "*batch q_heads width"], kv_heads: int) -> Shaped[Array, "*batch kv_heads width"]:
    """Sum over the query heads of each KV head."""
    return jnp.sum(x.reshape(*x.shape[:-2], kv_heads, -1, x.shape[-1]), axis=-2)


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
    if isinstance(params.stats, Coder):
        return transform.key_digits(params.stats.mean, params.stats.axes, params.stats.cells, keys)
    keys, lead = keys.astype(jnp.float32), (1,) * (keys.ndim - 2)
    if cfg.centre:
        mean, scale = (leaf.reshape(*lead, *leaf.shape) for leaf in (params.stats.mean, params.stats.scale))
        keys = (keys - mean) / scale
    assert isinstance(params.weights, NetworkWeights)
    return _apply_network(params.weights.keys, keys, cfg)


def hash_queries(
    params: HashParams, queries: Shaped[Array, "*batch q_heads head_dim"], cfg: HashConfig
) -> Float[Array, "*batch q_heads code_bits"]:
    """One layer's query side: each query head's bit weights times its gain, or its code before the sign (symmetric).

    Centred keys are (k - mean) / scale, so q . k ranks keys as (q * scale) . centred k does. For networks queries are
    brought to unit root mean square there, each group as a whole: no rank changes, of a head or of its group's sum.
    """
    if isinstance(params.weights, TransformWeights):
        return transform.bit_weights(params.weights.decode, params.weights.log_gain, queries)
    queries, lead = queries.astype(jnp.float32), (1,) * (queries.ndim - 2)
    kv_heads, head_dim = params.stats.mean.shape
    if cfg.centre:
        assert isinstance(params.stats, KeyStats)
        grouped = queries.reshape(*queries.shape[:-2], kv_heads, -1, head_dim)
        grouped = grouped * params.stats.scale.reshape(*lead, kv_heads, 1, head_dim)
        grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True) + 1e-12)
        queries = grouped.reshape(queries.shape)
    if params.weights.queries is None:
        return _apply_network(params.weights.keys, queries, cfg)
    outputs = _apply_network(params.weights.queries, queries, cfg)
    assert params.weights.log_gain is not None, "only the symmetric form has no gains"
    return outputs * jnp.exp(params.weights.log_gain).reshape(*lead, -1, 1)


def sum_weights(
    params: HashParams, outputs: Float[Array, "*batch q_heads code_bits"], cfg: HashConfig, per_kv_head: bool
) -> Float[Array, "*batch heads sums code_bits"]:
    """The real weights by which a head, or a KV head's group together, scores tokens, from `hash_queries`.

    Sums of the transform form are brought to one length.
    """
    if cfg.form == "symmetric":
        outputs = jnp.where(outputs > 0, 1.0, -1.0)
    if not isinstance(params.stats, Coder):
        return (sum_groups(outputs, params.kv_heads) if per_kv_head else outputs)[..., None, :]
    sums = transform.add_heads(params.stats.members, outputs) if per_kv_head else outputs[..., None, :]
    return transform.to_one_length(sums)


def soft_sign(x: Float[Array, "*shape"], gamma: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """Differentiable sign: gamma x / (1 + gamma |x|), the paper's; tends to the sign as gamma grows."""
    return gamma * x / (1 + gamma * jnp.abs(x))


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
) -> Int32[Array, "batch q_len heads sums code_bits"]:
    """One layer's integer bit weights; see `integer_weights`."""
    return integer_weights(params, hash_queries(params, queries, cfg), cfg, per_kv_head)


def integer_weights(
    params: HashParams, outputs: Float[Array, "batch q_len q_heads code_bits"], cfg: HashConfig, per_kv_head: bool
) -> Int32[Array, "batch q_len heads sums code_bits"]:
    """`sum_weights` in integers, within `weight_bounds`: sums of +-1 as they are (symmetric), others rounded.

    per_kv_head: one selection for each KV head's group; needs one code per KV head.
    """
    sums = sum_weights(params, outputs, cfg, per_kv_head)
    return sums.astype(jnp.int32) if cfg.form == "symmetric" else quantise(sums)


def weight_bounds(cfg: HashConfig, group: int, per_kv_head: bool) -> WeightBounds:
    """What `query_weights` can give: it bounds scores."""
    if cfg.form != "symmetric":
        return real_bounds(cfg.code_bits)
    limit = group if per_kv_head else 1
    return WeightBounds(limit, limit * cfg.code_bits)
