"""Generation on meshes of virtual devices against one device; `test_sharding` runs this in a process of its own."""

import dataclasses
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.cached_attention import _append_and_select
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.generation import head_shape
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.sharding import by_heads, bytes_per_device, mesh_of, open_mesh, place
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.tail import init_tail
from tests.hash_params import draw_params

SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))
FORMS = {
    "transform": TransformConfig(code_bits=64),
    "paper": NetworkConfig(form="symmetric", skip="none", code_bits=32, hidden=24, code_heads="query", centre=False),
}


def make_model(kv_heads: int) -> DecoderConfig:
    """A tiny model whose sizes divide by 2 and 3 but for its vocabulary, which divides by 3 alone."""
    return DecoderConfig(
        vocab=321, embed=48, layers=2, q_heads=2 * kv_heads, kv_heads=kv_heads, head_dim=16, mlp=96, max_len=512,
        tied=kv_heads == 3, qkv_bias=True, o_bias=True, mlp_bias=True,
    )  # fmt: skip


def make_selector(cfg: DecoderConfig, form: str, has_tail: bool) -> Selector:
    """A selector with another set of hash functions for short sequences."""
    shape = head_shape(cfg)

    def draw(seed):
        tail = init_tail(cfg.layers, cfg.q_heads) if has_tail else None
        return dataclasses.replace(draw_params(FORMS[form], shape, seed), tail=tail)

    return Selector(shape, draw(1), "", {}, positions=512, shorter=((60, draw(2)),))


def decode_all(engine: Engine, prompts: list[list[int]], new: int) -> tuple[np.ndarray, list]:
    """All tokens, and the caches of all layers."""
    state = engine.prefill(prompts, new)
    chosen = [np.asarray(state.tokens)[:, None]]
    while not np.asarray(state.is_done).all():
        state, tokens = engine.decode(state)
        chosen.append(tokens)
    return np.concatenate(chosen, axis=1), state.cache.layers


def compare(sizes: dict[str, int], kv_heads: int, form: str | None, per: str, has_tail: bool) -> None:
    """Decode on a mesh and on one device; texts and codes are equal, moments and keys nearly."""
    cfg = make_model(kv_heads)
    params, selector = init_params(jax.random.key(0), cfg), form and make_selector(cfg, form, has_tail)
    decode = DecodeConfig(selection=dataclasses.replace(SPARSE, per=per), prefill_chunk=32, block=8)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab, length).tolist() for length in (40, 70, 33, 64)]
    mesh = open_mesh(sizes, cfg)
    spread = place(params, mesh)
    assert mesh_of(spread) == mesh and mesh_of(params) is None
    parts = sizes.get("model", 1)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(spread))
    assert own == bytes_per_device(params, mesh)
    assert (own == whole) if parts == 1 else whole / parts <= own < whole * (0.6 if parts == 3 else 0.75), (own, whole)
    one, several = (Engine(cfg, weights, selector or None, decode) for weights in (params, spread))
    expected, caches = decode_all(one, prompts, 20)
    found, spread_caches = decode_all(several, prompts, 20)
    np.testing.assert_array_equal(found, expected)
    for layer, other in zip(spread_caches, caches, strict=True):
        assert len(layer.keys.sharding.device_set) == mesh.size
        assert layer.keys.addressable_shards[0].data.nbytes == layer.keys.nbytes // mesh.size
        np.testing.assert_allclose(layer.keys[:, :60], other.keys[:, :60], atol=1e-4)
        if layer.codes is not None:
            ends = min(map(len, prompts)) + 19
            np.testing.assert_array_equal(layer.codes[..., :ends], other.codes[..., :ends])
        for ours, theirs in zip(jax.tree.leaves(layer.moments), jax.tree.leaves(other.moments), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    check_traffic(several)
    if form is not None and sizes.get("context", 1) == 1:
        compare_selections(several, caches[1])
    print("equal:", sizes, kv_heads, form, per, has_tail)


def check_traffic(engine: Engine) -> None:
    """Between devices pass the sums of the stream that a layer's two halves need, and nothing that is larger."""
    cfg, mesh = engine.model_cfg, engine.mesh
    for key, program in engine.programs.items():
        found = re.findall(
            r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(",
            program.as_text(),
        )
        sizes = [(kind, [int(size) for size in shape.split(",") if size]) for _, shape, kind in found]
        streams = [shape for kind, shape in sizes if kind == "all-reduce" and shape[-1:] == [cfg.embed]]
        tables = cfg.vocab % mesh.shape["model"] == 0  # rows of the embedding lie apart: looking them up is a sum too
        expected = {"prefill": 2, "decode": 2 * cfg.layers + tables}
        if key[0] in expected and mesh.shape["model"] > 1:
            assert len(streams) == expected[key[0]], (key[0], sizes)
        if mesh.shape["data"] == mesh.shape["context"] == 1 and cfg.vocab % mesh.shape["model"] == 0:
            assert all(shape in streams or math.prod(shape) <= 16 * mesh.size for _, shape in sizes), (key[0], sizes)


def compare_selections(engine: Engine, layer) -> None:
    """The same queries over the same cache choose the same tokens."""
    cfg, mesh, selection = engine.model_cfg, engine.mesh, engine.cfg.selection
    shapes = [(4, 1, heads, cfg.head_dim) for heads in (cfg.q_heads, cfg.kv_heads, cfg.kv_heads)]
    new = [jax.random.normal(jax.random.key(place), shape) for place, shape in enumerate(shapes)]
    lengths = jnp.asarray([50, 80, 20, 77], jnp.int32)
    selector = engine.selectors(np.zeros(4, int))[1]

    def attend(queries, keys, values, layer, selector, lengths):
        args = queries, keys, values, layer, lengths, selector, selection, None
        _, layer, indices, is_real = _append_and_select(*args)
        places = jax.nn.one_hot(indices, layer.keys.shape[1]) * is_real[..., None]
        return places.sum(axis=-2)[:, None], layer

    alone = jax.device_put((layer, selector), jax.devices()[0])
    expected, _ = jax.jit(lambda state, new: by_heads(attend, None, *state, lengths)(*new))(alone, new)
    spread = place((layer, selector), mesh)
    found, _ = jax.jit(lambda state, new: by_heads(attend, mesh, *state, lengths)(*new))(spread, new)
    assert np.asarray(expected).sum() > 40
    np.testing.assert_array_equal(found, expected)


CASES = [
    ({"model": 2}, 4, "transform", "kv_head", True),
    ({"model": 3}, 3, "transform", "query_head", False),
    ({"data": 2, "model": 2}, 4, "paper", "query_head", True),
    ({"model": 4}, 4, None, "kv_head", False),
    ({"context": 4}, 4, "transform", "kv_head", True),
    ({"context": 8}, 3, "paper", "query_head", False),
    ({"data": 2, "model": 2, "context": 2}, 4, "transform", "query_head", True),
]

if __name__ == "__main__":
    chosen = [CASES[int(number)] for number in sys.argv[1:]] or CASES
    for case in chosen:
        compare(*case)
