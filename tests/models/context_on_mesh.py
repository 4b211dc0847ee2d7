"""Sparse decoding with a cache split by tokens against one device; `test_sharding` runs this in its own process."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from spotlight_jax.cache import LayerCache
from spotlight_jax.cached_attention import LayerSelector, attend_sparsely
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.mesh import AXES
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.kernels.hash_append import hash_append
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.score_select import score_select
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.sparse_attention import estimated_attention, sparse_attention
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    estimated_attention_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.models.sharding import by_heads, on_own_slots, place
from spotlight_jax.moments import empty_moments, fold
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.selection import budget_of, max_budget, select_tokens
from spotlight_jax.tail import init_tail
from tests.hash_params import draw_params

SHAPE = HeadShape(1, 8, 4, 16)
BATCH, SLOTS = 4, 256
FORMS = {
    "transform": TransformConfig(code_bits=64),
    "paper": NetworkConfig(form="symmetric", skip="none", code_bits=32, hidden=24, code_heads="query", centre=False),
}
LENGTHS = np.array([150, 64, 1, 254], np.int32)  # the second one's new token is at a device's first slot


def make_mesh(data: int, model: int, context: int) -> jax.sharding.Mesh:
    """A mesh over the first of the virtual devices."""
    devices = jax.devices()[: data * model * context]
    return jax.make_mesh((data, model, context), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def make_layer(form: str, has_tail: bool) -> tuple[LayerCache, LayerSelector]:
    """A filled cache; what lies behind each sequence's end must not matter."""
    functions, moments = draw_params(FORMS[form], SHAPE), None
    keys, values = (jax.random.normal(jax.random.key(n), (BATCH, SLOTS, SHAPE.kv_heads, 16)) for n in range(2))
    if has_tail:
        functions = dataclasses.replace(functions, tail=init_tail(1, SHAPE.q_heads))
        none = empty_moments(BATCH, SHAPE.kv_heads, 16, keys.dtype)
        moments = fold(none, keys, values, jnp.zeros(BATCH, jnp.int32), jnp.asarray(LENGTHS), SLOTS)
    selector = LayerSelector(functions.layer(0))
    return LayerCache(keys, values, selector.key_codes(keys), moments), selector


def compare_moments(mesh: jax.sharding.Mesh, tokens: int) -> None:
    """Blocks that become full are in the moments of every device as they are in those of one, bit for bit."""
    layer, _ = make_layer("transform", has_tail=True)
    starts = jnp.asarray([127, 63, 5, 190], jnp.int32)
    ends = starts + jnp.asarray([tokens, tokens, 0, min(tokens, 2)], jnp.int32)
    expected = jax.jit(lambda: fold(layer.moments, layer.keys, layer.values, starts, ends, tokens))()

    def own(layer, starts, ends):
        return fold(layer.moments, layer.keys, layer.values, starts, ends, tokens, "context")

    found = jax.jit(lambda layer: on_own_slots(own, mesh, layer, starts, ends))(place(layer, mesh))
    assert (np.asarray(expected.count) > np.asarray(layer.moments.count))[:2].all()
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def compare_steps(mesh: jax.sharding.Mesh, form: str, selection: SelectionConfig, has_tail: bool = False) -> None:
    """One step gives the outputs and the cache of one device."""
    layer, selector = make_layer(form, has_tail)
    shapes = [(BATCH, 1, heads, 16) for heads in (SHAPE.q_heads, SHAPE.kv_heads, SHAPE.kv_heads)]
    new = [jax.random.normal(jax.random.key(10 + n), shape) for n, shape in enumerate(shapes)]
    lengths = jnp.asarray(LENGTHS)

    def attend_alone(*args):
        *state, lengths = args
        new_and_layer, selector = state[:4], state[4]
        return attend_sparsely(*new_and_layer, lengths, selector, selection)

    expected, cached = jax.jit(attend_alone)(*new, layer, selector, lengths)
    attend = functools.partial(attend_sparsely, selection=selection, axis="context")
    spread = place((layer, selector), mesh)
    assert spread[0].keys.addressable_shards[0].data.nbytes == layer.keys.nbytes // mesh.size

    def attend_own(queries, keys, values, layer, selector, lengths):
        return attend(queries, keys, values, layer, lengths, selector)

    found, split = jax.jit(lambda state, new: by_heads(attend_own, mesh, *state, lengths)(*new))(spread, new)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def compare_selections(mesh: jax.sharding.Mesh, selection: SelectionConfig, score_range: tuple[int, int]) -> None:
    """The same tokens are chosen, set for set, where most scores are tied and where none is."""
    scores = jax.random.randint(jax.random.key(5), (BATCH, 3, SLOTS), score_range[0], score_range[1] + 1)
    ends = jnp.asarray(LENGTHS) + 1
    indices, is_real = jax.jit(lambda: select_tokens(scores, ends, selection, score_range))()
    expected = positions_of(indices, is_real)
    found = run_split(mesh, lambda scores: select_tokens(scores, ends, selection, score_range, axis="context"), scores)
    assert positions_of(*found) == expected
    assert sum(map(len, expected)) > 60


def positions_of(indices: np.ndarray, is_real: np.ndarray) -> list[list[int]]:
    """The positions of each row that are real, in order."""
    rows = zip(np.reshape(indices, (-1, indices.shape[-1])), np.reshape(is_real, (-1, indices.shape[-1])), strict=True)
    return [row[real].tolist() for row, real in rows]


def run_split(mesh: jax.sharding.Mesh, select, array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What devices select of their own parts of an array whose last axis is positions: positions in the whole."""

    def select_own(own):
        indices, is_real = select(own)
        return indices + jax.lax.axis_index("context") * own.shape[-1], is_real

    spec = jax.sharding.PartitionSpec(*[None] * (array.ndim - 1), "context")
    last = jax.sharding.PartitionSpec(None, None, "context")
    run = jax.shard_map(select_own, mesh=mesh, in_specs=spec, out_specs=(last, last), check_vma=False)
    return jax.jit(run)(array)


def compare_kernels(mesh: jax.sharding.Mesh, selection: SelectionConfig) -> None:
    """The kernels, on Pallas' interpreter, give what the references give of the whole cache."""
    layer, selector = make_layer("transform", has_tail=True)
    assert layer.codes is not None
    lengths, ends = jnp.asarray(LENGTHS), jnp.asarray(LENGTHS) + 1
    heads = [jax.random.normal(jax.random.key(10 + n), (BATCH, count, 16)) for n, count in enumerate((8, 4, 4))]
    transform = selector.functions.transform
    call = *heads, transform, layer.keys, layer.values, layer.codes, lengths
    _, weights, *expected = jax.jit(functools.partial(hash_append, impl="reference"))(*call)
    slots, codes = jax.sharding.PartitionSpec(None, "context"), jax.sharding.PartitionSpec(None, None, None, "context")
    none = jax.sharding.PartitionSpec()

    def append_own(keys, values, codes):
        return hash_append_pallas_triton(*heads, transform, keys, values, codes, lengths, "context", interpret=True)[2:]

    caches = (slots, slots, codes)
    run = jax.shard_map(append_own, mesh=mesh, in_specs=caches, out_specs=caches, check_vma=False)
    for ours, theirs in zip(jax.jit(run)(layer.keys, layer.values, layer.codes), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    keys, values, held = expected
    bounds = selector.functions.weight_bounds(2, True)
    counts, most = budget_of(ends, selection), max_budget(SLOTS, selection)
    forced = selection.sink_tokens, selection.recent_tokens
    indices, is_real = score_select(held, weights, ends, counts, most, bounds, *forced, impl="reference")
    width = min(most, SLOTS // mesh.shape["context"])

    def select_own(codes):
        call = codes, weights, ends, counts, width, bounds, *forced
        return score_select_pallas_triton(*call, "context", interpret=True)

    assert positions_of(*run_split(mesh, select_own, held)) == positions_of(indices, is_real)

    known = layer.moments, selector.tail
    out, share = estimated_attention(heads[0], keys, values, indices, is_real, ends, *known, impl="gather")

    def read_own(keys, values, codes):
        chosen = select_own(codes)
        alone = sparse_attention_pallas_triton(heads[0], keys, values, *chosen, "context", interpret=True)
        call = heads[0], keys, values, *chosen, ends, *known
        return alone, *estimated_attention_pallas_triton(*call, "context", interpret=True)

    run = jax.shard_map(read_own, mesh=mesh, in_specs=caches, out_specs=(none,) * 3, check_vma=False)
    expected = sparse_attention(heads[0], keys, values, indices, is_real, impl="reference"), out, share
    for ours, theirs in zip(jax.jit(run)(keys, values, held), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


if __name__ == "__main__":
    kept = SelectionConfig(keep=0.2, min_tokens=5, sink_tokens=2, recent_tokens=3)
    for context, score_range in ((2, (-2, 1)), (2, (-30, 40)), (4, (-(2**20), 2**20)), (8, (-2, 1)), (8, (-30, 40))):
        compare_selections(make_mesh(1, 1, context), kept, score_range)
    compare_selections(make_mesh(1, 1, 8), SelectionConfig(budget=40), (-2, 1))
    compare_steps(make_mesh(1, 1, 8), "transform", kept)
    compare_steps(make_mesh(2, 2, 2), "transform", kept, has_tail=True)
    compare_moments(make_mesh(1, 2, 4), tokens=1)
    compare_moments(make_mesh(2, 1, 4), tokens=70)
    compare_steps(make_mesh(1, 2, 4), "transform", dataclasses.replace(kept, per="query_head"), has_tail=True)
    compare_steps(make_mesh(2, 2, 2), "paper", dataclasses.replace(kept, per="query_head"))
    compare_steps(make_mesh(1, 1, 4), "paper", kept)
    compare_kernels(make_mesh(1, 1, 4), kept)
    print("equal")
