"""What every form of hash functions is: keys become binary codes, queries become weights of the bits.

All forms share one scoring rule (`weights`) and one code layout: `transform` (the default), and with `networks` the
asymmetric form and the paper's symmetric one. Nothing outside this package asks which of them it holds.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, Shaped, UInt32

from spotlight_jax.bits import pack_bits
from spotlight_jax.cache import LayerCache, append
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.fitting import Moments
from spotlight_jax.tail import TailParams
from spotlight_jax.weights import WeightBounds, quantise, real_bounds

Form = TypeVar("Form", bound="HashFunctions")
_MOST_HEADS = 2**12  # and layers, and dimensions of a head: far above any model's


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


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that hash functions are fitted to: all layers on some windows."""

    moments: Moments
    windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # keys, a few queries, their positions; may be none
    selection: SelectionConfig  # how many tokens are read
    layers_at_once: int


@flax.struct.dataclass
class HashFunctions:
    """The hash functions of some layers: what is trained, what was measured of text before, and their config.

    All leaves of a selector's lead with a layer axis; methods that take keys or queries are of one layer, without it.
    """

    weights: Any  # all that is trained
    stats: Any  # measured once, never trained
    cfg: HashConfig = flax.struct.field(pytree_node=False)
    tail: TailParams | None = None  # corrections of the estimate of what is not read; None: nothing is estimated

    fitted_to: ClassVar[Literal["nothing", "moments", "windows"]]  # what `fit` needs of a `Sample`

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.stats.mean.shape[-2]

    def layer(self: Form, index: int) -> Form:
        """Return the hash functions of one layer, without the layer axis."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def fit(self: Form, sample: Sample) -> Form:
        """Fit the hash functions of `init_functions` to the keys and queries of this text, in all layers."""
        raise NotImplementedError

    def hash_keys(self, keys: Shaped[Array, "*batch kv_heads head_dim"]) -> Float[Array, "*batch code_heads code_bits"]:
        """Return the key side before the sign: bit b of a key is 1 where the result is > 0."""
        raise NotImplementedError

    def hash_queries(
        self, queries: Shaped[Array, "*batch q_heads head_dim"]
    ) -> Float[Array, "*batch q_heads code_bits"]:
        """Return the query side: each query head's bit weights times its scale, or what they are the signs of."""
        raise NotImplementedError

    def score_heads(
        self, outputs: Float[Array, "*batch q_heads code_bits"], per_kv_head: bool
    ) -> Float[Array, "*batch heads score_heads code_bits"]:
        """Return the real weights by which a head, or a KV head's group, scores tokens, from `hash_queries`."""
        raise NotImplementedError

    def soft_codes(
        self, keys: Shaped[Array, "kv_len kv_heads head_dim"], gamma: Float[Array, ""]
    ) -> Float[Array, "kv_len code_heads code_bits"]:
        """Return differentiable codes, bits of about -1 and +1; gamma is the sharpness of their sign."""
        raise NotImplementedError

    def soft_weights(
        self, queries: Shaped[Array, "q_len q_heads head_dim"], gamma: Float[Array, ""], per_kv_head: bool
    ) -> Float[Array, "q_len heads score_heads code_bits"]:
        """Return what soft codes are multiplied with: a group's weights are made of its heads' as in decoding."""
        return self.score_heads(self.hash_queries(queries), per_kv_head)

    def key_codes(
        self, keys: Shaped[Array, "batch kv_len kv_heads head_dim"]
    ) -> UInt32[Array, "batch code_heads words kv_len"]:
        """Return packed key codes, word-major: what the cache stores and scoring streams."""
        return jnp.moveaxis(pack_bits(self.hash_keys(keys) > 0), 1, -1)

    def query_weights(
        self, queries: Shaped[Array, "batch q_len q_heads head_dim"], per_kv_head: bool = False
    ) -> Int32[Array, "batch q_len heads score_heads code_bits"]:
        """Return integer bit weights; see `integer_weights`."""
        return self.integer_weights(self.hash_queries(queries), per_kv_head)

    def integer_weights(
        self, outputs: Float[Array, "batch q_len q_heads code_bits"], per_kv_head: bool
    ) -> Int32[Array, "batch q_len heads score_heads code_bits"]:
        """Return `score_heads` in integers, within `weight_bounds`.

        Args:
            outputs: of `hash_queries`.
            per_kv_head: one selection for each KV head's group; needs one code per KV head.
        """
        return quantise(self.score_heads(outputs, per_kv_head))

    def weight_bounds(self, group: int, per_kv_head: bool) -> WeightBounds:
        """Return the bounds of what `query_weights` can give, and so of scores."""
        return real_bounds(self.cfg.code_bits)

    def adds_scores(self, per_kv_head: bool) -> bool:
        """Whether a KV head's score is the sum of its query heads' scores, each of a code of its own: no weights of the
        whole group exist then."""
        return False

    def append(
        self,
        queries: Shaped[Array, "batch one q_heads head_dim"],
        keys: Shaped[Array, "batch one kv_heads head_dim"],
        values: Shaped[Array, "batch one kv_heads head_dim"],
        layer: LayerCache,
        lengths: Int32[Array, "batch"],
        axis: str | None = None,
    ) -> tuple[
        Shaped[Array, "batch one q_heads head_dim"], Int[Array, "batch kv_heads score_heads code_bits"], LayerCache
    ]:
        """Return a decoded token's weights for each KV head, and the layer with its keys, values and codes.

        Args:
            axis: over which the layer's slots are split (`token_axis`).

        Returns: first the queries to go on with, which equal those given.
        """
        layer = append(layer, keys, values, self.key_codes(keys), lengths, axis)
        return queries, self.query_weights(queries, per_kv_head=True)[:, 0], layer


def orthogonal_planes(
    key: PRNGKeyArray, heads: int, head_dim: int, code_bits: int
) -> Float[Array, "heads head_dim code_bits"]:
    """Return unit-norm columns of as many independent random rotations as `code_bits` needs: orthogonal LSH."""
    blocks = -(-code_bits // head_dim)
    rotations = jax.random.orthogonal(key, head_dim, shape=(heads, blocks), dtype=jnp.float32)
    return jnp.moveaxis(rotations, 1, 2).reshape(heads, head_dim, blocks * head_dim)[..., :code_bits]


def sum_groups(x: Shaped[Array, "*batch q_heads width"], kv_heads: int) -> Shaped[Array, "*batch kv_heads width"]:
    """Sum over the query heads of each KV head."""
    return jnp.sum(x.reshape(*x.shape[:-2], kv_heads, -1, x.shape[-1]), axis=-2)
