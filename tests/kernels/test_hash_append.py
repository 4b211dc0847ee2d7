"""hash_append: a step's hashing and appending, on the interpreter here and compiled where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import hashing
from spotlight_jax.cache import LayerCache
from spotlight_jax.cached_attention import LayerSelector, attend_sparsely
from spotlight_jax.kernels import hash_append as op
from spotlight_jax.kernels import score_select
from spotlight_jax.kernels.hash_append import Networks, hash_append
from spotlight_jax.kernels.hash_append.cases import CASES
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.selection import SelectionConfig
from tests.kernels.cuda import lower_for_cuda

STATIC = {"static_argnames": ("limit", "per_kv_head")}
IMPLEMENTATIONS = {
    "reference": jax.jit(functools.partial(hash_append, impl="reference"), **STATIC),
    "kernel": jax.jit(functools.partial(hash_append_pallas_triton, interpret=True), **STATIC),
}


def draw_networks(rng, heads, head_dim, hidden, code_bits):
    def draw(*shape):
        return jnp.asarray(rng.normal(0, shape[1] ** -0.5 if len(shape) == 3 else 1, shape), jnp.float32)

    kernels = draw(heads, head_dim, hidden), draw(heads, hidden), draw(heads, hidden, code_bits)
    return Networks(*kernels, draw(heads, code_bits), draw(heads, head_dim, code_bits))


def draw_call(batch, q_heads, kv_heads, head_dim, hidden, code_bits, max_len=9, dtype="float32", of_cache="float32"):
    """Sequences end all over the cache; what lies in it is random."""
    rng = np.random.default_rng(0)

    def draw(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    nets = (draw_networks(rng, heads, head_dim, hidden, code_bits) for heads in (q_heads, kv_heads))
    new = (draw(batch, heads, head_dim, dtype=dtype) for heads in (q_heads, kv_heads, kv_heads))
    stats = draw(kv_heads, head_dim), jnp.abs(draw(kv_heads, head_dim)) + 0.3, draw(q_heads)
    cached = (draw(batch, max_len, kv_heads, head_dim, dtype=of_cache) for _ in range(2))
    codes = jnp.asarray(rng.integers(0, 2**32, (batch, kv_heads, code_bits // 32, max_len)), jnp.uint32)
    lengths = jnp.asarray(rng.permutation(np.arange(batch) % max_len), jnp.int32)
    return *new, *nets, *stats, *cached, codes, lengths


def hash_by_numpy(queries, keys, of_queries, of_keys, mean, scale, log_gain):
    """Query outputs and packed codes, head by head in float64, as the docstring says."""

    def apply(net, head, x):
        net = {name: np.asarray(leaf[head], np.float64) for name, leaf in net._asdict().items()}
        hidden = x @ net["hidden_kernel"] + net["hidden_bias"]
        out = hidden / (1 + np.exp(-hidden)) @ net["out_kernel"] + net["out_bias"]
        return out + x @ net["rotation"]

    queries, keys, mean, scale, log_gain = (np.asarray(x, np.float64) for x in (queries, keys, mean, scale, log_gain))
    group = queries.shape[1] // keys.shape[1]
    outputs, bits = [], []
    for kv_head in range(keys.shape[1]):
        own = queries[:, kv_head * group : (kv_head + 1) * group] * scale[kv_head]
        own = own / np.sqrt((own**2).mean((1, 2), keepdims=True))
        heads = range(kv_head * group, (kv_head + 1) * group)
        outputs += [np.exp(log_gain[head]) * apply(of_queries, head, own[:, place]) for place, head in enumerate(heads)]
        bits.append(apply(of_keys, kv_head, (keys[:, kv_head] - mean[kv_head]) / scale[kv_head]) > 0)
    return np.stack(outputs, axis=1), np.packbits(np.stack(bits, axis=1), axis=-1, bitorder="little").view("<u4")


def unpack(packed):
    """Byte t of a row's number 8 w + j is the weight of bit 32 w + j + 8 t."""
    bytes_ = np.ascontiguousarray(packed).view(np.int8).reshape(*packed.shape[:-1], -1, 8, 4)
    return bytes_.swapaxes(-1, -2).reshape(*packed.shape[:-1], -1)


def scaled_by_numpy(call, limit, per_kv_head):
    """Weights before they are rounded, and the codes."""
    queries, keys, _, *hash_function = call[:8]
    outputs, codes = hash_by_numpy(queries, keys, *hash_function)
    if per_kv_head:
        outputs = outputs.reshape(outputs.shape[0], keys.shape[1], -1, outputs.shape[-1]).sum(2)
    return outputs * limit / np.abs(outputs).max(-1, keepdims=True), codes


SHAPES = {
    "one sequence": ((1, 6, 2, 64, 128, 128), {"dtype": "bfloat16", "of_cache": "bfloat16"}, 7, True),
    "odd widths, two tiles": ((35, 2, 1, 80, 72, 96), {}, 127, True),
    "few hidden units, per query head": ((3, 6, 2, 16, 40, 256), {"of_cache": "bfloat16"}, 7, False),
    "no groups, one word": ((2, 3, 3, 48, 100, 32), {}, 1, True),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_implementation_equals_numpy(impl, name):
    shape, dtypes, limit, per_kv_head = SHAPES[name]
    call = draw_call(*shape, **dtypes)
    packed, *caches = IMPLEMENTATIONS[impl](*call, limit=limit, per_kv_head=per_kv_head)
    scaled, codes = scaled_by_numpy(call, limit, per_kv_head)
    weights = unpack(np.asarray(packed))
    assert np.abs(weights - scaled).max() < 0.5 + 1e-3 and np.all(np.abs(weights).max(-1) == limit)
    keys, values, lengths = call[1], call[2], np.asarray(call[-1])
    expected = [np.array(cache) for cache in call[8:11]]
    for sequence, at in enumerate(lengths):
        expected[0][sequence, at] = np.asarray(keys[sequence].astype(expected[0].dtype))
        expected[1][sequence, at] = np.asarray(values[sequence].astype(expected[1].dtype))
        expected[2][sequence, :, :, at] = codes[sequence]
    for found, cache in zip(caches, expected, strict=True):
        assert found.dtype == cache.dtype
        np.testing.assert_array_equal(np.asarray(found), cache)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_token_that_does_not_fit_takes_the_last_place(impl):
    *call, lengths = draw_call(2, 2, 1, 16, 16, 32)
    run = functools.partial(IMPLEMENTATIONS[impl], *call, limit=7, per_kv_head=True)
    full, over = run(jnp.full_like(lengths, 8)), run(jnp.asarray([9, 1000], jnp.int32))
    for pair in zip(full, over, strict=True):
        np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize(("batch", "per"), [(1, "query_head"), (3, "kv_head")])
def test_a_sparse_step_is_the_same_with_the_kernels(monkeypatch, batch, per):
    """On the interpreter, against the step in plain XLA."""
    shape, cfg = hashing.HeadShape(1, 6, 2, 16), hashing.HashConfig(code_bits=64, hidden=24)
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, shape), 0)
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.1, params.weights)
    stats = params.stats.replace(mean=params.stats.mean + 0.2, scale=params.stats.scale * 1.5)
    selector = LayerSelector(params.replace(weights=weights, stats=stats), cfg)

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
        monkeypatch.setattr(
            module, kernel.__name__, lambda *args, run=run, **named: calls.append(run) or run(*args, **named)
        )
    found = jax.jit(lambda *args: step(*args))(*call)
    assert len(calls) == 2
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for pair in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(*pair)


def call_of(case):
    widths = case.batch, case.q_heads, case.kv_heads, case.head_dim, case.hidden, case.code_bits
    return draw_call(*widths, case.max_len, case.dtype, case.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_lower_for_cuda_at_every_real_shape(case):
    text = lower_for_cuda(functools.partial(hash_append, limit=7, per_kv_head=case.per_kv_head), *call_of(case))
    assert "hash_networks" in text and "hash_append" in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_equal_the_reference_on_a_gpu(case):
    call = call_of(case)
    with jax.default_matmul_precision("highest"):
        expected = IMPLEMENTATIONS["reference"](*call, limit=7, per_kv_head=case.per_kv_head)
    found = jax.jit(hash_append, **STATIC)(*call, limit=7, per_kv_head=case.per_kv_head)
    off = np.abs(unpack(np.asarray(found[0])) - unpack(np.asarray(expected[0])))
    assert off.max() <= 1 and off.mean() < 0.02
    for pair in zip(found[1:3], expected[1:3], strict=True):
        np.testing.assert_array_equal(*pair)
    written = case.batch * case.kv_heads * case.code_bits
    assert jax.lax.population_count(found[3] ^ expected[3]).sum() <= max(2, 0.005 * written)  # TF32: what is next to 0
