"""What `eval.speed` times: one layer's operations over random caches of a given length, by name.

A timed step runs an operation on each of several caches, so that no cache of the device holds what the next run reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import get_args

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt32

from eval.speed.timing import Op
from spotlight_jax.cache import LANES, LayerCache
from spotlight_jax.cached_attention import LayerSelector, attend_densely, attend_sparsely
from spotlight_jax.config.generation import AttentionImpl
from spotlight_jax.config.hashing import WORD_BITS, HashConfig, NetworkConfig, TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.kernels.sparse_attention import sparse_attention
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.networks import sign_bounds
from spotlight_jax.selector.selection import max_budget, select_by_codes, select_tokens
from spotlight_jax.weights import WeightBounds, quantise, real_bounds

COLD_BYTES = {"cpu": 128 << 20}  # what a step walks over at least, so that no cache of the device helps
GPU_COLD_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class OpShape:
    """One layer's heads and the caches it reads."""

    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    length: int
    dtype: str
    code_bits: int
    selection: SelectionConfig

    @property
    def group(self) -> int:
        """Return how many query heads share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def sums(self) -> int:
        """Return the number of sums of weights that score a token."""
        return min(TransformConfig().sums, self.group)

    @property
    def bounds(self) -> WeightBounds:
        """Return the bounds of weights that were real."""
        return real_bounds(self.code_bits)

    @property
    def sign_bounds(self) -> WeightBounds:
        """Return the bounds of a group's sums of signs."""
        return sign_bounds(self.code_bits, self.group)

    @property
    def slots(self) -> int:
        """Return the allocated length: a multiple, as of all caches, with a slot for the appended token."""
        return LANES * (self.length // LANES + 1)

    @property
    def budget(self) -> int:
        """Return the tokens that each KV head reads."""
        return max_budget(self.length, self.selection)

    def bytes_of(self, what: str) -> int:
        """Return the bytes of the named part of one layer, all sequences together."""
        rows = self.batch * self.kv_heads
        row = 2 * self.head_dim * jnp.dtype(self.dtype).itemsize
        return {
            "keys and values": rows * self.length * row,
            "selected": rows * self.budget * row,
            "codes": rows * self.length * self.code_bits // 8,
            "scores": rows * self.length * 4,
            "indices": rows * self.budget * 5,  # a position and whether it is real
        }[what]


def shape_of(cfg: DecoderConfig, batch: int, length: int, dtype: str, code_bits: int, keep: float) -> OpShape:
    """Return one layer of a model."""
    selection = SelectionConfig(keep=keep, min_context=0, dense_layers=())
    return OpShape(cfg.q_heads, cfg.kv_heads, cfg.head_dim, batch, length, dtype, code_bits, selection)


def count_copies(shape: OpShape, platform: str, free: int | None, most: int) -> int:
    """Return how many caches a step walks over: enough to leave none in the device's caches; 0 where none fits."""
    each = shape.bytes_of("keys and values") + 2 * shape.bytes_of("codes") + 2 * shape.bytes_of("scores")
    fitting = most if free is None else int(0.8 * free / each)
    cold = math.ceil(COLD_BYTES.get(platform, GPU_COLD_BYTES) / shape.bytes_of("codes"))
    return min(most, cold, fitting)


@flax.struct.dataclass
class OpInputs:
    """What a layer's operations get apart from the caches."""

    queries: Float[Array, "batch one q_heads head_dim"]
    keys: Float[Array, "batch one kv_heads head_dim"]
    values: Float[Array, "batch one kv_heads head_dim"]
    lengths: Int32[Array, "batch"]  # filled slots, before the new token
    weights: Int32[Array, "batch one kv_heads score_heads code_bits"]
    signs: Int32[Array, "batch one kv_heads one code_bits"]  # sums of the group's signs
    selector: LayerSelector
    hamming: LayerSelector  # the paper's form, its group summed


@flax.struct.dataclass
class Held:
    """One layer's cache, with what single operations start from."""

    layer: LayerCache
    scores: Int[Array, "batch kv_heads slots"]
    indices: Int32[Array, "batch kv_heads budget"]
    is_real: Bool[Array, "batch kv_heads budget"]


def draw_inputs(shape: OpShape) -> OpInputs:
    """Draw random queries, weights and hash functions."""
    keys = jax.random.split(jax.random.key(0), 6)
    dtype = jnp.dtype(shape.dtype)
    per_kv = (shape.batch, 1, shape.kv_heads)
    heads = HeadShape(1, shape.q_heads, shape.kv_heads, shape.head_dim)

    def selector(hash_cfg: HashConfig) -> LayerSelector:
        return LayerSelector(init_functions(keys[5], hash_cfg, heads).layer(0))

    signs = jax.random.bernoulli(keys[4], shape=(*per_kv, shape.group, shape.code_bits))
    return OpInputs(
        queries=jax.random.normal(keys[0], (shape.batch, 1, shape.q_heads, shape.head_dim), dtype),
        keys=jax.random.normal(keys[1], (*per_kv, shape.head_dim), dtype),
        values=jax.random.normal(keys[2], (*per_kv, shape.head_dim), dtype),
        lengths=jnp.full((shape.batch,), shape.length - 1, jnp.int32),
        weights=quantise(jax.random.normal(keys[3], (*per_kv, shape.sums, shape.code_bits))),
        signs=jnp.sum(2 * signs.astype(jnp.int32) - 1, axis=3, keepdims=True),
        selector=selector(TransformConfig(code_bits=shape.code_bits)),
        hamming=selector(NetworkConfig("symmetric", shape.code_bits, skip="none", centre=False)),
    )


@functools.partial(jax.jit, static_argnums=1)
def draw_layer(key: Array, shape: OpShape) -> LayerCache:
    """Draw a cache of random numbers."""
    keys = jax.random.split(key, 3)
    rows = (shape.batch, shape.slots, shape.kv_heads, shape.head_dim)
    codes = (shape.batch, shape.kv_heads, shape.code_bits // WORD_BITS, shape.slots)
    return LayerCache(
        keys=jax.random.normal(keys[0], rows, shape.dtype),
        values=jax.random.normal(keys[1], rows, shape.dtype),
        codes=jax.random.bits(keys[2], codes, jnp.uint32),
    )


def _mixed(
    weights: Int32[Array, "*lead code_bits"], bit: Int32[Array, ""], bounds: WeightBounds
) -> Int32[Array, "*lead code_bits"]:
    """Return weights that wait for a bit of the output before and stay within their bounds: the first one gives way."""
    changed = jnp.clip(weights[..., :1] - bit * jnp.sign(weights[..., :1]), -bounds.limit, bounds.limit)
    return jnp.concatenate([changed, weights[..., 1:]], axis=-1)


def _codes_of(held: Held) -> UInt32[Array, "batch kv_heads words slots"]:
    assert held.layer.codes is not None
    return held.layer.codes


def empty_op(bit: Int32[Array, ""], inputs: OpInputs, held: Held) -> tuple[Array, Held]:
    """Do what every operation does around its work: mix the bit into an input."""
    return inputs.weights ^ bit, held


def make_ops(shape: OpShape, dense: tuple[AttentionImpl, ...]) -> dict[str, Op]:
    """Return the operations by name; each gets a bit of the output before it and mixes that into its input."""

    def score(bit: Array, inputs: OpInputs, held: Held) -> Array:
        return match_score(_codes_of(held), _mixed(inputs.weights, bit, shape.bounds), shape.bounds.bits)[:, 0]

    def score_signs(bit: Array, inputs: OpInputs, held: Held) -> Array:
        return match_score(_codes_of(held), _mixed(inputs.signs, bit, shape.sign_bounds), shape.sign_bounds.bits)[:, 0]

    def select(scores: Array, lengths: Array) -> tuple[Array, Array]:
        return select_tokens(scores, lengths, shape.selection, shape.bounds.score_range)

    def take_top(scores: Array) -> Array:
        return lax.top_k(scores.astype(jnp.float32), shape.budget)[1]  # floats: its fastest form, and exact here

    def nudged(bit: Array, inputs: OpInputs) -> Array:
        return inputs.queries + (bit * 1e-3).astype(inputs.queries.dtype)

    def attend(bit: Array, inputs: OpInputs, held: Held, chosen: tuple[Array, Array]) -> Array:
        return sparse_attention(nudged(bit, inputs)[:, 0], held.layer.keys, held.layer.values, *chosen)

    def choose(bit: Array, inputs: OpInputs, held: Held) -> tuple[Array, Array]:
        weights = _mixed(inputs.weights, bit, shape.bounds)[:, 0]
        return select_by_codes(_codes_of(held), weights, shape.bounds, inputs.lengths + 1, shape.selection)

    def choose_by_signs(bit: Array, inputs: OpInputs, held: Held) -> tuple[Array, Array]:
        weights = _mixed(inputs.signs, bit, shape.sign_bounds)[:, 0]
        return select_by_codes(_codes_of(held), weights, shape.sign_bounds, inputs.lengths + 1, shape.selection)

    def choose_plainly(bit: Array, inputs: OpInputs, held: Held) -> tuple[Array, Array]:
        return select(score(bit, inputs, held), inputs.lengths + 1)

    def read(bit: Array, inputs: OpInputs, held: Held) -> Array:
        return attend(bit, inputs, held, choose(bit, inputs, held))

    def sparse_layer(selector_of: Callable[[OpInputs], LayerSelector]) -> Op:
        def run(bit: Array, inputs: OpInputs, held: Held) -> tuple[Array, Held]:
            new = (nudged(bit, inputs), inputs.keys, inputs.values, held.layer, inputs.lengths)
            out, layer = attend_sparsely(*new, selector_of(inputs), shape.selection)
            return out, dataclasses.replace(held, layer=layer)

        return run

    def dense_layer(name: AttentionImpl) -> Op:
        def run(bit: Array, inputs: OpInputs, held: Held) -> tuple[Array, Held]:
            new = (nudged(bit, inputs), inputs.keys, inputs.values, held.layer, inputs.lengths)
            out, layer = attend_densely(*new, None, name)
            return out, dataclasses.replace(held, layer=layer)

        return run

    def reading(run: Callable[[Array, OpInputs, Held], PyTree]) -> Op:
        return lambda bit, inputs, held: (run(bit, inputs, held), held)

    return {
        "score": reading(score),
        "score, Hamming": reading(score_signs),
        "select": reading(lambda b, i, h: select(h.scores + b, i.lengths + 1)),
        "lax.top_k": reading(lambda b, i, h: take_top(h.scores[:, :, : shape.length] + b)),
        "score + select": reading(choose),
        "score + select, Hamming": reading(choose_by_signs),
        "score + select, XLA": reading(choose_plainly),
        "score + lax.top_k": reading(lambda b, i, h: take_top(score(b, i, h)[:, :, : shape.length])),
        "attend": reading(lambda b, i, h: attend(b, i, h, (h.indices ^ b, h.is_real))),
        "score + select + attend": reading(read),
        "sparse layer": sparse_layer(lambda inputs: inputs.selector),
        "sparse layer, Hamming": sparse_layer(lambda inputs: inputs.hamming),
        **{f"dense layer, {name}": dense_layer(name) for name in dense},
    }


def read_bytes(shape: OpShape, name: str, inputs: OpInputs) -> int:
    """Return the bytes that an operation has to move: the floor of its time is these over the copy bandwidth."""
    networks = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs.selector.functions))
    codes, scores, indices = (shape.bytes_of(part) for part in ("codes", "scores", "indices"))
    selected, everything = shape.bytes_of("selected"), shape.bytes_of("keys and values")
    if name.startswith("dense layer"):
        return everything
    base = name.split(", ")[0]
    return {
        "score": codes + scores,
        "select": scores + indices,
        "lax.top_k": scores + indices,
        "score + select": codes + indices,
        "score + lax.top_k": codes + indices,
        "attend": selected,
        "score + select + attend": codes + selected,
        "sparse layer": codes + selected + networks,
    }[base]


@functools.partial(jax.jit, static_argnums=2)
def _hold(layer: LayerCache, inputs: OpInputs, shape: OpShape) -> Held:
    """Return a cache with its scores and what they select."""
    assert layer.codes is not None
    scores = match_score(layer.codes, inputs.weights, shape.bounds.bits)[:, 0]
    indices, is_real = select_tokens(scores, inputs.lengths + 1, shape.selection, shape.bounds.score_range)
    return Held(layer, scores, indices, is_real)


def draw_held(shape: OpShape, inputs: OpInputs, copies: int) -> tuple[Held, ...]:
    """Draw random caches, each with its scores and selection."""
    return tuple(_hold(draw_layer(jax.random.key(7 + place), shape), inputs, shape) for place in range(copies))


def runnable_dense(shape: OpShape) -> tuple[AttentionImpl, ...]:
    """Return the implementations of dense attention that can decode this shape here.

    On a GPU `auto` is one of the others and not timed twice; on a CPU it is another form.
    """

    def attend(name: AttentionImpl) -> Array:
        inputs, layer = draw_inputs(shape), draw_layer(jax.random.key(0), shape)
        return attend_densely(inputs.queries, inputs.keys, inputs.values, layer, inputs.lengths, None, name)[0]

    found = []
    for name in get_args(AttentionImpl):
        if name == "auto" and jax.default_backend() != "cpu":
            continue
        try:
            jax.eval_shape(functools.partial(attend, name))
        except ValueError:  # where it cannot run
            continue
        found.append(name)
    return tuple(found)
