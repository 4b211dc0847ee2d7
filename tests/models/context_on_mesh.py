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
from spotlight_jax.context_attention import attend_split, fold_split, select_split
from spotlight_jax.models.sharding import by_heads, on_own_slots, place
from spotlight_jax.moments import empty_moments, fold
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.selection import budget_of, select_tokens
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
    own = functools.partial(fold_split, tokens=tokens)
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
    attend = functools.partial(attend_split, selection=selection)
    spread = place((layer, selector), mesh)
    assert spread[0].keys.addressable_shards[0].data.nbytes == layer.keys.nbytes // mesh.size
    found, split = jax.jit(lambda state, new: by_heads(attend, mesh, *state, lengths)(*new))(spread, new)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def compare_selections(mesh: jax.sharding.Mesh, selection: SelectionConfig, score_range: tuple[int, int]) -> None:
    """The same tokens are chosen, set for set, where most scores are tied and where none is."""
    scores = jax.random.randint(jax.random.key(5), (BATCH, 3, SLOTS), score_range[0], score_range[1] + 1)
    ends = jnp.asarray(LENGTHS) + 1
    indices, is_real = jax.jit(lambda: select_tokens(scores, ends, selection, score_range))()
    rows = np.arange(BATCH)[:, None, None], np.arange(3)[None, :, None]
    expected = np.zeros(scores.shape, int)
    np.add.at(expected, (*rows, np.asarray(indices)), np.asarray(is_real))

    def select_own(scores, ends):
        first = jax.lax.axis_index("context") * scores.shape[-1]
        return select_split(scores, ends, budget_of(ends, selection), first, selection, score_range, "context")

    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        select_own, mesh=mesh, in_specs=(spec(None, None, "context"), spec()), out_specs=spec(None, None, "context"),
        check_vma=False,
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(run)(scores, ends), expected.astype(bool))
    assert expected.sum() > 60


if __name__ == "__main__":
    kept = SelectionConfig(keep=0.2, min_tokens=5, sink_tokens=2, recent_tokens=3)
    for context in (2, 4, 8):
        for score_range in ((-2, 1), (-30, 40), (-(2**20), 2**20)):
            compare_selections(make_mesh(1, 1, context), kept, score_range)
    compare_selections(make_mesh(1, 1, 8), SelectionConfig(budget=40), (-2, 1))
    compare_steps(make_mesh(1, 1, 8), "transform", kept)
    compare_steps(make_mesh(2, 2, 2), "transform", kept, has_tail=True)
    compare_moments(make_mesh(1, 2, 4), tokens=1)
    compare_moments(make_mesh(2, 1, 4), tokens=70)
    compare_steps(make_mesh(1, 2, 4), "transform", dataclasses.replace(kept, per="query_head"), has_tail=True)
    compare_steps(make_mesh(2, 2, 2), "paper", dataclasses.replace(kept, per="query_head"))
    compare_steps(make_mesh(1, 1, 4), "paper", kept)
    print("equal")
