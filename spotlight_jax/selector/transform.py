"""The transform form, the default: keys become digits of fitted coordinates, queries learn a weight for each bit.

A key's code holds its coordinates on axes that were fitted to text, in fixed point with as many bits each as their
variance deserves (`fitting`). A query's bit weights are a linear map of it, and are what is trained. Their plain JAX is
that of `kernels/hash_append`, the op of a decoding step.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, Shaped

from spotlight_jax.cache import LayerCache
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.kernels.hash_append import Transform, hash_append
from spotlight_jax.kernels.hash_append.reference import add_heads, key_digits, to_one_length, weigh_bits
from spotlight_jax.selector import fitting
from spotlight_jax.selector.base import HashFunctions, HeadShape, Sample, orthogonal_planes


@flax.struct.dataclass
class TransformWeights:
    """All that is trained of the transform form."""

    bit_weights: Float[Array, "*layers kv_heads head_dim code_bits"]  # of a bit, by the query
    log_head_scale: Float[Array, "*layers q_heads"]  # scale of a query head in its score head


@flax.struct.dataclass
class KeyQuantizer:
    """The key side of the transform form: fitted once, never trained.

    Bit b of a key is a binary digit of the coordinate u = (key - mean) . axes_b + 1/2, which is cut off at 0 and 1: the
    lowest digit of ceil(levels_b u) - 1, where levels are 2 for the first digit and twice as many for each after it.
    """

    mean: Float[Array, "*layers kv_heads head_dim"]
    axes: Float[Array, "*layers kv_heads head_dim code_bits"]
    levels: Float[Array, "*layers kv_heads code_bits"]
    head_assignment: Float[Array, "*layers kv_heads score_heads group"]  # 1 where a query head is part of a score head


@flax.struct.dataclass
class TransformHash(HashFunctions):
    """Hash functions of the transform form."""

    weights: TransformWeights
    stats: KeyQuantizer
    cfg: TransformConfig = flax.struct.field(pytree_node=False)

    fitted_to: ClassVar[Literal["windows"]] = "windows"

    def fit(self, sample: Sample) -> "TransformHash":
        """Fit axes, digits and bit weights to these moments, then share query heads out between the score heads."""
        axes, levels, bit_weights = fitting.fit_layers(sample.moments, self.cfg.code_bits)
        stats = dataclasses.replace(self.stats, mean=sample.moments.mean, axes=axes, levels=levels)
        if sample.windows and stats.head_assignment.shape[-2] > 1:
            assigned = fitting.assign_heads(sample.moments, sample.windows, sample.selection, sample.layers_at_once)
            stats = dataclasses.replace(stats, head_assignment=assigned)
        weights = dataclasses.replace(self.weights, bit_weights=bit_weights)
        return dataclasses.replace(self, weights=weights, stats=stats)

    def hash_keys(self, keys: Shaped[Array, "*batch kv_heads head_dim"]) -> Float[Array, "*batch kv_heads code_bits"]:
        """Return digits of coordinates; see `HashFunctions.hash_keys`."""
        return key_digits(self.stats.mean, self.stats.axes, self.stats.levels, keys)

    def hash_queries(
        self, queries: Shaped[Array, "*batch q_heads head_dim"]
    ) -> Float[Array, "*batch q_heads code_bits"]:
        """Return each query head's bit weights times its scale."""
        return weigh_bits(self.weights.bit_weights, self.weights.log_head_scale, queries)

    def score_heads(
        self, outputs: Float[Array, "*batch q_heads code_bits"], per_kv_head: bool
    ) -> Float[Array, "*batch heads score_heads code_bits"]:
        """Return weights of each score head, brought to one length; see `HashFunctions.score_heads`."""
        return to_one_length(add_heads(self.stats.head_assignment, outputs) if per_kv_head else outputs[..., None, :])

    def soft_codes(
        self, keys: Shaped[Array, "kv_len kv_heads head_dim"], gamma: Float[Array, ""]
    ) -> Float[Array, "kv_len kv_heads code_bits"]:
        """Return fitted codes as they are, since they are not trained: no gamma softens them."""
        return jnp.where(self.hash_keys(keys) > 0, 1.0, -1.0)

    @property
    def transform(self) -> Transform:
        """One layer's arrays as `hash_append` takes them."""
        stats, weights = self.stats, self.weights
        return Transform(
            stats.mean, stats.axes, stats.levels, weights.bit_weights, stats.head_assignment, weights.log_head_scale
        )

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
        """Run one op for all of it; see `HashFunctions.append`."""
        assert layer.codes is not None, "a layer with a selector keeps codes"
        rows = queries[:, 0], keys[:, 0], values[:, 0]
        copied, summed, cached_keys, cached_values, codes = hash_append(
            *rows, self.transform, layer.keys, layer.values, layer.codes, lengths, axis=axis
        )
        return copied[:, None], summed, dataclasses.replace(layer, keys=cached_keys, values=cached_values, codes=codes)


def init_layer(key: PRNGKeyArray, cfg: TransformConfig, shape: HeadShape) -> TransformHash:
    """Draw one layer: signs on random axes, orthogonal LSH, and all query heads in each score head."""
    planes = orthogonal_planes(key, shape.kv_heads, shape.head_dim, cfg.code_bits)
    quantizer = KeyQuantizer(
        mean=jnp.zeros((shape.kv_heads, shape.head_dim)),
        axes=planes,
        levels=jnp.full((shape.kv_heads, cfg.code_bits), 2.0),
        head_assignment=jnp.ones((shape.kv_heads, min(cfg.sums, shape.group), shape.group)),
    )
    bit_weights = jnp.copy(planes)  # a training step donates both
    return TransformHash(TransformWeights(bit_weights, jnp.zeros((shape.q_heads,))), quantizer, cfg)
