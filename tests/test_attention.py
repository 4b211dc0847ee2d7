import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.attention import causal_attention

BATCH, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 8


def draw(q_len: int, kv_len: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(q_len * 1000 + kv_len), 3)
    return (
        2 * jax.random.normal(keys[0], (BATCH, q_len, KV_HEADS * GROUP, HEAD_DIM), dtype),
        jax.random.normal(keys[1], (BATCH, kv_len, KV_HEADS, HEAD_DIM), dtype),
        jax.random.normal(keys[2], (BATCH, kv_len, KV_HEADS, HEAD_DIM), dtype),
    )


def plain_attention(queries, keys, values, offsets, scale=HEAD_DIM**-0.5) -> np.ndarray:
    """One query, head and sequence at a time, in float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    outputs = np.zeros_like(queries)
    for b, t, h in np.ndindex(queries.shape[:3]):
        last = offsets[b] + t + 1
        scores = keys[b, :last, h // GROUP] @ queries[b, t, h] * scale
        weights = np.exp(scores - scores.max())
        outputs[b, t, h] = weights @ values[b, :last, h // GROUP] / weights.sum()
    return outputs


@pytest.mark.parametrize(
    ("q_len", "kv_len", "chunk"), [(40, 40, 2), (40, 40, 64), (23, 40, 7), (3, 40, 64), (1, 40, 64)]
)
def test_equals_attention_written_out(q_len: int, kv_len: int, chunk: int) -> None:
    queries, keys, values = draw(q_len, kv_len)
    ours = jax.jit(functools.partial(causal_attention, chunk=chunk))(queries, keys, values)
    np.testing.assert_allclose(ours, plain_attention(queries, keys, values, [kv_len - q_len] * BATCH), atol=2e-6)


@pytest.mark.parametrize("q_len", [1, 20])
def test_offsets_place_the_queries_and_unfilled_slots_change_nothing(q_len: int) -> None:
    queries, keys, values = draw(q_len, 48)
    offsets = jnp.array([0, 17], jnp.int32)
    filled = (np.arange(48)[None, :] < np.asarray(offsets)[:, None] + q_len)[:, :, None, None]
    poisoned = [jnp.where(filled, x, 1e30) for x in (keys, values)]
    ours = jax.jit(functools.partial(causal_attention, chunk=8))(queries, *poisoned, offsets=offsets)
    np.testing.assert_allclose(ours, plain_attention(queries, keys, values, offsets), atol=2e-6)


def test_scale_replaces_the_default() -> None:
    queries, keys, values = draw(20, 20)
    ours = causal_attention(queries, keys, values, scale=0.1)
    np.testing.assert_allclose(ours, plain_attention(queries, keys, values, [0, 0], scale=0.1), atol=2e-6)


def test_bfloat16_accumulates_in_float32() -> None:
    queries, keys, values = draw(64, 64, jnp.bfloat16)
    ours = causal_attention(queries, keys, values, chunk=16)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), plain_attention(queries, keys, values, [0, 0]), atol=3e-2)


def test_scores_of_all_heads_and_queries_are_never_held_at_once() -> None:
    arguments = [jax.ShapeDtypeStruct((1, 4096, heads, 16), jnp.float32) for heads in (8, 2, 2)]
    compiled = jax.jit(functools.partial(causal_attention, chunk=128)).lower(*arguments).compile()
    one_chunk = 4 * 128 * 4096 * 4  # group x chunk x kv_len float32
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * one_chunk  # all heads and queries: 128 x as much


def test_lowers_for_cuda() -> None:
    arguments = [jax.ShapeDtypeStruct((1, 640, heads, 64), jnp.float32) for heads in (8, 2, 2)]
    jax.jit(causal_attention).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8)), "3 query heads are not a multiple of 2 KV heads"),
        (((1, 5, 2, 8), (1, 4, 2, 8)), "5 queries but only 4 keys"),
        (((1, 4, 2, 6), (1, 4, 2, 8)), "differ in batch or head_dim"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message: str) -> None:
    queries, keys = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(causal_attention)(queries, keys, keys)  # past the tests' own shape checks


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="says why a CPU cannot")
def test_a_named_implementation_that_cannot_run_raises() -> None:
    with pytest.raises(ValueError, match=r"cudnn.*not an NVIDIA GPU"):
        causal_attention(*draw(20, 20, jnp.bfloat16), implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize(("q_len", "kv_len", "with_offsets"), [(256, 256, False), (1, 300, False), (1, 300, True)])
def test_cudnn_equals_xla(q_len: int, kv_len: int, with_offsets: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (2, q_len, 6, 64), jnp.bfloat16)
    cache = [jax.random.normal(key, (2, kv_len, 2, 64), jnp.bfloat16) for key in keys[1:]]
    offsets = jnp.array([40, 299], jnp.int32) if with_offsets else None
    fused, plain = (
        causal_attention(queries, *cache, offsets=offsets, implementation=name).astype(jnp.float32)
        for name in ("cudnn", "xla")
    )
    np.testing.assert_allclose(fused, plain, atol=3e-2)
