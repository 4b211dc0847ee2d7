"""hash_append: a step's hashing and appending, on the interpreter here and compiled where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.bits import pack_bits
from spotlight_jax.cache import LayerCache
from spotlight_jax.cached_attention import LayerSelector, attend_sparsely
from spotlight_jax.config.hashing import FORMS, TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.kernels import hash_append as op
from spotlight_jax.kernels import score_select
from spotlight_jax.kernels.hash_append import Transform, hash_append
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.selector.base import HeadShape
from tests.hash_params import draw_params

IMPLEMENTATIONS = {
    "reference": jax.jit(functools.partial(hash_append, impl="reference")),
    "kernel": jax.jit(functools.partial(hash_append_pallas_triton, interpret=True)),
}


def draw_transform(rng, kv_heads, group, head_dim, code_bits, sums):
    """One to four digits an axis, and keys on both sides of the outermost cells; some heads are in one sum alone."""

    def draw(*shape, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)

    members = jnp.asarray(rng.integers(0, 2, (kv_heads, sums, group)), jnp.float32)
    members = members.at[:, :, 0].set(1.0)  # no sum is empty
    cells = jnp.asarray(2.0 ** rng.integers(1, 5, (kv_heads, code_bits)), jnp.float32)
    axes = draw(kv_heads, head_dim, code_bits, scale=0.4 * head_dim**-0.5)
    decode = draw(kv_heads, head_dim, code_bits)
    return Transform(draw(kv_heads, head_dim), axes, cells, decode, members, draw(kv_heads * group))


def draw_call(batch, q_heads, kv_heads, head_dim, code_bits, sums, max_len=9, dtype="float32", of_cache="float32"):
    """Sequences end all over the cache; what lies in it is random."""
    rng = np.random.default_rng(0)

    def draw(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    transform = draw_transform(rng, kv_heads, q_heads // kv_heads, head_dim, code_bits, sums)
    new = (draw(batch, heads, head_dim, dtype=dtype) for heads in (q_heads, kv_heads, kv_heads))
    cached = (draw(batch, max_len, kv_heads, head_dim, dtype=of_cache) for _ in range(2))
    codes = jnp.asarray(rng.integers(0, 2**32, (batch, kv_heads, code_bits // 32, max_len)), jnp.uint32)
    lengths = jnp.asarray(rng.permutation(np.arange(batch) % max_len), jnp.int32)
    return *new, transform, *cached, codes, lengths


def hash_by_numpy(queries, keys, transform):
    """Weights before they are rounded, and codes, head by head in float64, as the docstrings say."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    mean, axes, cells, decode, members, log_gain = (np.asarray(leaf, np.float64) for leaf in transform)
    group, code_bits = queries.shape[1] // keys.shape[1], axes.shape[2]
    mix = members * np.exp(log_gain).reshape(len(members), 1, -1)
    weights, bits = [], []
    for head in range(keys.shape[1]):
        own = queries[:, head * group : (head + 1) * group]
        sums = np.stack([np.tensordot(own, shares, (1, 0)) @ decode[head] for shares in mix[head]], axis=1)
        sums /= np.linalg.norm(sums, axis=2, keepdims=True)
        largest, total = np.abs(sums).max((1, 2)), np.abs(sums).sum(2).max(1)
        weights.append(sums * np.minimum(127 / largest, (1020 - code_bits // 2) / total)[:, None, None])
        places = cells[head] * ((keys[:, head] - mean[head]) @ axes[head] + 0.5)
        bits.append(np.clip(np.floor(places), 0, cells[head] - 1).astype(int) % 2 == 1)
    return np.stack(weights, axis=1), np.packbits(np.stack(bits, axis=1), axis=-1, bitorder="little").view("<u4")


SHAPES = {
    "one sequence": ((1, 6, 2, 64, 128, 2), {"dtype": "bfloat16", "of_cache": "bfloat16"}),
    "odd widths, two tiles": ((35, 2, 1, 80, 96, 1), {}),
    "more bits than dimensions": ((3, 6, 2, 16, 256, 2), {"of_cache": "bfloat16"}),
    "no groups, one word": ((2, 3, 3, 48, 32, 1), {}),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_implementation_equals_numpy(impl, name):
    shape, dtypes = SHAPES[name]
    call = draw_call(*shape, **dtypes)
    copied, weights, *caches = IMPLEMENTATIONS[impl](*call)
    queries, keys, values, transform, *cached, lengths = call
    np.testing.assert_array_equal(copied, queries)
    scaled, codes = hash_by_numpy(queries, keys, transform)
    weights = np.asarray(weights, int)
    assert np.abs(weights - scaled).max() < 0.5 + 1e-3
    assert np.abs(weights).max() <= 127 and np.abs(weights).sum(-1).max() <= 1020
    expected = [np.array(cache) for cache in cached]
    for sequence, at in enumerate(np.asarray(lengths)):
        expected[0][sequence, at] = np.asarray(keys[sequence].astype(expected[0].dtype))
        expected[1][sequence, at] = np.asarray(values[sequence].astype(expected[1].dtype))
        expected[2][sequence, :, :, at] = codes[sequence]
    for found, cache in zip(caches, expected, strict=True):
        assert found.dtype == cache.dtype
        np.testing.assert_array_equal(np.asarray(found), cache)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_digits_and_weights_by_hand(impl):
    """A mean of 0.25 and one axis with cells of 2, 4 and 8; queries 3 and -5: the first, and both."""
    transform = Transform(
        mean=jnp.array([[0.25]]),
        axes=jnp.ones((1, 1, 32)).at[..., 3:].set(0.0),
        levels=jnp.full((1, 32), 2.0).at[0, :3].set(jnp.array([2.0, 4.0, 8.0])),
        bit_weights=jnp.zeros((1, 1, 32)).at[..., :3].set(jnp.array([5.0, 2.0, -1.0])),
        head_assignment=jnp.array([[[1.0, 0.0], [1.0, 1.0]]]),
        log_head_scale=jnp.zeros((2,)),
    )
    keys = jnp.array([-9.0, -0.24, -0.06, 0.19, 0.32, 0.7, 9.0])
    batch = len(keys)
    queries = jnp.broadcast_to(jnp.array([3.0, -5.0])[None, :, None], (batch, 2, 1))
    cached = jnp.zeros((batch, 2, 1, 1)), jnp.zeros((batch, 2, 1, 1)), jnp.zeros((batch, 1, 1, 2), jnp.uint32)
    new = queries, keys[:, None, None], keys[:, None, None]
    _, weights, _, _, codes = IMPLEMENTATIONS[impl](*new, transform, *cached, jnp.ones((batch,), jnp.int32))
    # coordinates below 0, of .01, .19, .44, .57, .95, and above 1 lie in eighths 0, 0, 1, 3, 4, 7, 7: digit 0 counts 4
    assert codes[:, 0, 0, 1].tolist() == [0b000, 0b000, 0b100, 0b110, 0b001, 0b111, 0b111]
    assert not codes[..., 0].any()
    # 3 and -2 times (5, 2, -1), each brought to one length; 127 for the greatest
    assert weights[0, 0, :, :3].tolist() == [[127, 51, -25], [-127, -51, 25]] and not weights[..., 3:].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_token_that_does_not_fit_takes_the_last_place(impl):
    *call, lengths = draw_call(2, 2, 1, 16, 32, 2)
    run = functools.partial(IMPLEMENTATIONS[impl], *call)
    full, over = run(jnp.full_like(lengths, 8)), run(jnp.asarray([9, 1000], jnp.int32))
    for pair in zip(full, over, strict=True):
        np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_selectors_codes_and_weights_are_those_of_hashing(impl):
    """Codes of every bit; weights but for those that lie halfway between two integers, which may go to either."""
    cfg, shape = TransformConfig(code_bits=128), HeadShape(1, 12, 3, 64)
    params = draw_params(cfg, shape).layer(0)
    queries, keys, values, _, *caches, lengths = draw_call(20, 12, 3, 64, 128, 2)
    _, found, _, _, cached_codes = IMPLEMENTATIONS[impl](queries, keys, values, params.transform, *caches, lengths)
    codes = pack_bits(params.hash_keys(keys) > 0)
    np.testing.assert_array_equal(cached_codes[np.arange(20), :, :, lengths], codes)
    weights = params.integer_weights(params.hash_queries(queries[:, None]), True)[:, 0]
    off = np.abs(np.asarray(found, int) - np.asarray(weights))
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_key_on_a_cells_end_has_the_code_of_hashing_and_is_in_the_cell_below(impl):
    """Four digits on each axis of the space; keys at every sixteenth, the ends and beyond, exact in float32."""
    cfg, shape = TransformConfig(code_bits=64), HeadShape(1, 6, 3, 16)
    params = draw_params(cfg, shape).layer(0)
    mean = jnp.arange(3.0)[:, None] - jnp.arange(16.0)[None, :] / 4
    axes = jnp.broadcast_to(jnp.repeat(jnp.eye(16), 4, axis=1), params.stats.axes.shape)
    params = params.replace(stats=params.stats.replace(mean=mean, axes=axes))
    places = np.arange(21)[:, None, None] + np.arange(3)[None, :, None] + np.arange(16)[None, None, :]
    steps = places % 21 - 2  # every axis of every head meets all of them
    keys = jnp.asarray(steps / 16 - 0.5, jnp.float32) + mean[None]
    queries, _, _, _, *caches, lengths = draw_call(21, 6, 3, 16, 64, 2)
    *_, cached_codes = IMPLEMENTATIONS[impl](queries, keys, keys, params.transform, *caches, lengths)
    found = np.asarray(cached_codes)[np.arange(21), :, :, lengths]
    hashed = jax.jit(lambda params, x: params.hash_keys(x))(params, keys)
    np.testing.assert_array_equal(found, np.packbits(hashed > 0, axis=-1, bitorder="little").view("<u4"))
    bits = np.clip(steps - 1, 0, 15)[..., None] >> np.arange(4)[::-1] & 1
    below = np.packbits(bits.reshape(21, 3, 64), axis=-1, bitorder="little").view("<u4")
    np.testing.assert_array_equal(found, below)


@pytest.mark.parametrize(
    ("batch", "per", "form", "kernels"),
    [
        (1, "kv_head", "transform", ["hash_append", "score_select"]),
        (3, "kv_head", "transform", ["hash_append", "score_select"]),
        (3, "query_head", "transform", ["score_select"]),
        (3, "kv_head", "asymmetric", ["score_select"]),
        (1, "query_head", "symmetric", ["score_select"]),
    ],
)
def test_a_sparse_step_is_the_same_with_the_kernels(monkeypatch, batch, per, form, kernels):
    """On the interpreter, against the step in plain XLA; hash_append runs for what it is written for."""
    shape, cfg = HeadShape(1, 6, 2, 16), FORMS[form](form, code_bits=64)
    selector = LayerSelector(draw_params(cfg, shape).layer(0))
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    codes = jnp.asarray(rng.integers(0, 2**32, (batch, 2, 2, 256)), jnp.uint32)
    layer = LayerCache(draw(batch, 256, 2, 16), draw(batch, 256, 2, 16), codes)
    new = draw(batch, 1, 6, 16), draw(batch, 1, 2, 16), draw(batch, 1, 2, 16)
    step = functools.partial(attend_sparsely, selection=SelectionConfig(keep=0.1, sink_tokens=2, per=per))
    call = *new, layer, jnp.asarray([255, 0, 130][:batch], jnp.int32), selector
    expected = jax.jit(step)(*call)

    calls = []
    for module, kernel in ((op, hash_append_pallas_triton), (score_select, score_select_pallas_triton)):
        run = functools.partial(kernel, interpret=True)
        monkeypatch.setattr(module, "is_trusted", lambda *_: True)
        name = kernel.__name__.removesuffix("_pallas_triton")
        monkeypatch.setattr(
            module,
            kernel.__name__,
            lambda *args, run=run, name=name, **named: calls.append(name) or run(*args, **named),
        )
    found = jax.jit(lambda *args: step(*args))(*call)
    assert calls == kernels
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for pair in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(*pair)
