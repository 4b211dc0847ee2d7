"""hash_networks: one kernel for both sides of a step, on the interpreter here and compiled where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import hashing
from spotlight_jax.kernels.hash_networks import Networks, hash_networks
from spotlight_jax.kernels.hash_networks.cases import CASES
from spotlight_jax.kernels.hash_networks.pallas_triton import hash_networks_pallas_triton
from tests.kernels.cuda import lower_for_cuda

IMPLEMENTATIONS = {
    "reference": jax.jit(functools.partial(hash_networks, impl="reference")),
    "kernel": jax.jit(functools.partial(hash_networks_pallas_triton, interpret=True)),
}


def draw_networks(rng, heads, head_dim, hidden, code_bits):
    def draw(*shape):
        return jnp.asarray(rng.normal(0, shape[1] ** -0.5 if len(shape) == 3 else 1, shape), jnp.float32)

    kernels = draw(heads, head_dim, hidden), draw(heads, hidden), draw(heads, hidden, code_bits)
    return Networks(*kernels, draw(heads, code_bits), draw(heads, head_dim, code_bits))


def draw_call(batch, q_heads, kv_heads, head_dim, hidden, code_bits):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    nets = (draw_networks(rng, heads, head_dim, hidden, code_bits) for heads in (q_heads, kv_heads))
    rows = draw(batch, q_heads, head_dim), draw(batch, kv_heads, head_dim)
    return *rows, *nets, draw(kv_heads, head_dim), np.abs(draw(kv_heads, head_dim)) + 0.3, draw(q_heads)


def hash_by_numpy(queries, keys, of_queries, of_keys, mean, scale, gain):
    """Head by head in float64, as the docstring says."""

    def apply(net, head, x):
        net = {name: np.asarray(leaf[head], np.float64) for name, leaf in net._asdict().items()}
        hidden = x @ net["hidden_kernel"] + net["hidden_bias"]
        out = hidden / (1 + np.exp(-hidden)) @ net["out_kernel"] + net["out_bias"]
        return out + x @ net["rotation"]

    group = queries.shape[1] // keys.shape[1]
    weights, bits = [], []
    for kv_head in range(keys.shape[1]):
        own = queries[:, kv_head * group : (kv_head + 1) * group] * scale[kv_head].astype(np.float64)
        own = own / np.sqrt((own**2).mean((1, 2), keepdims=True))
        heads = range(kv_head * group, (kv_head + 1) * group)
        weights += [gain[head] * apply(of_queries, head, own[:, place]) for place, head in enumerate(heads)]
        bits.append(apply(of_keys, kv_head, (keys[:, kv_head] - mean[kv_head]) / scale[kv_head]) > 0)
    return np.stack(weights, axis=1), np.packbits(np.stack(bits, axis=1), axis=-1, bitorder="little").view("<u4")


SHAPES = [(1, 6, 2, 64, 128, 128), (17, 4, 4, 80, 200, 96), (3, 14, 2, 128, 40, 64)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=["one sequence", "odd widths", "few hidden units"])
def test_every_implementation_equals_numpy(impl, shape):
    call = draw_call(*shape)
    weights, codes = IMPLEMENTATIONS[impl](*call)
    expected, expected_codes = hash_by_numpy(*call)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(codes, expected_codes)


def test_a_step_is_what_the_hash_functions_give():
    shape, cfg = hashing.HeadShape(1, 6, 2, 16), hashing.HashConfig(code_bits=64, hidden=24)
    params = hashing.layer_params(hashing.init_params(jax.random.key(0), cfg, shape), 0)
    draw = np.random.default_rng(1).normal
    noise = jax.tree.map(lambda leaf: leaf + draw(size=leaf.shape).astype(np.float32) * 0.1, params.weights)
    stats = params.stats.replace(mean=params.stats.mean + 0.2, scale=params.stats.scale * 1.5)
    params = params.replace(weights=noise, stats=stats)
    queries, keys = (jnp.asarray(draw(size=(3, 1, heads, 16)), jnp.float32) for heads in (6, 2))
    nets = [Networks(**vars(net)) for net in (noise.queries, noise.keys)]
    gain = jnp.exp(noise.log_gain)
    weights, codes = IMPLEMENTATIONS["kernel"](queries[:, 0], keys[:, 0], *nets, stats.mean, stats.scale, gain)
    np.testing.assert_allclose(weights, hashing.hash_queries(params, queries, cfg)[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(codes, hashing.key_codes(params, keys, cfg)[..., 0])


def shapes_of(case):
    call = draw_call(case.batch, case.q_heads, case.kv_heads, case.head_dim, case.hidden, case.code_bits)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call)
    return *(jax.ShapeDtypeStruct(rows.shape, case.dtype) for rows in shapes[:2]), *shapes[2:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_lowers_for_cuda_at_every_real_shape(case):
    assert "hash_networks" in lower_for_cuda(hash_networks, *shapes_of(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_equals_the_reference_on_a_gpu(case):
    call = draw_call(case.batch, case.q_heads, case.kv_heads, case.head_dim, case.hidden, case.code_bits)
    with jax.default_matmul_precision("highest"):
        weights, codes = hash_networks(*map(jnp.asarray, call[:2]), *call[2:], impl="reference")
    found, found_codes = hash_networks(*map(jnp.asarray, call[:2]), *call[2:])
    np.testing.assert_allclose(found, weights, atol=2e-2 * float(jnp.abs(weights).max()))
    flipped = jax.lax.population_count(codes ^ found_codes).sum() / (32 * codes.size)
    assert flipped < 0.005  # TF32 changes signs of what is next to 0
