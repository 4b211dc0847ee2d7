import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.attention import causal_attention
from spotlight_jax.models.config import config_from_hf
from spotlight_jax.models.decoder import apply_layer, embed_tokens, init_params, unembed
from spotlight_jax.models.hf import hf_name
from spotlight_jax.models.load import load_model
from spotlight_jax.models.params import fill_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import Dense, forward
from tests.models import golden, tiny


def build(case: str, **overrides):
    cfg = config_from_hf(tiny.CASES[case])
    params = fill_params(iter(tiny.hf_weights(cfg).items()), hf_name, cfg, jnp.float32, case)
    return dataclasses.replace(cfg, **overrides), params


@pytest.mark.parametrize("case", tiny.CASES)
def test_tiny_model_gives_the_logits_that_transformers_gave(case: str) -> None:
    cfg, params = build(case)
    ours = forward(params, jnp.asarray(tiny.tokens()), cfg)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[:, list(tiny.KEPT_POSITIONS)], golden.read_tiny(case), atol=1e-4)


@pytest.mark.slow
def test_smollm2_gives_the_logits_that_transformers_gave() -> None:
    model, recorded = load_model("smollm2-135m", jnp.float32), golden.read_smollm2()
    ours = np.asarray(forward(model.params, jnp.asarray(recorded["tokens"])[None], model.cfg))[0]
    np.testing.assert_allclose(golden.sample_smollm2(ours), recorded["logits"], atol=1e-3)
    np.testing.assert_array_equal(ours.argmax(-1), recorded["argmax"])


@pytest.mark.parametrize("case", ["llama_yarn", "qwen3", "llama_dynamic"])
def test_prefill_then_decode_equals_one_forward(case: str) -> None:
    cfg, params = build(case)
    tokens = jnp.asarray(tiny.tokens())
    whole, prompt = tokens.shape[1], 40
    positions = jnp.broadcast_to(jnp.arange(whole, dtype=jnp.int32)[None, :], tokens.shape)
    x = embed_tokens(params, tokens[:, :prompt], cfg)
    last = embed_tokens(params, tokens[:, prompt:], cfg)

    def attend_prompt(queries, keys, values):
        return causal_attention(queries, keys, values), (keys, values)

    @jax.jit
    def apply_to_both(layer_params, x, last):
        x, cache = apply_layer(layer_params, x, positions[:, :prompt], attend_prompt, cfg, rope_len=whole)

        def attend_rest(queries, keys, values):
            keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(cache, (keys, values), strict=True))
            return causal_attention(queries, keys, values), None

        return x, apply_layer(layer_params, last, positions[:, prompt:], attend_rest, cfg, rope_len=whole)[0]

    for layer in range(cfg.layers):
        x, last = apply_to_both(params[f"layer_{layer}"], x, last)
    expected = forward(params, tokens, cfg)
    np.testing.assert_allclose(unembed(params, x, cfg), expected[:, :prompt], atol=2e-5)
    np.testing.assert_allclose(unembed(params, last, cfg), expected[:, prompt:], atol=2e-5)


def test_a_sequence_alone_equals_the_same_sequence_in_a_batch() -> None:
    cfg, params = build("llama3")
    tokens = jnp.asarray(tiny.tokens())
    np.testing.assert_allclose(forward(params, tokens[1:], cfg)[0], forward(params, tokens, cfg)[1], atol=2e-5)


def test_jit_equals_no_jit() -> None:
    cfg, params = build("qwen2")
    tokens = jnp.asarray(tiny.tokens())
    with jax.disable_jit():
        plain = forward(params, tokens, cfg)
    np.testing.assert_allclose(jax.jit(forward, static_argnums=2)(params, tokens, cfg), plain, atol=2e-5)


def test_attend_sees_every_layer_and_its_aux_comes_back() -> None:
    cfg, params = build("qwen3")
    tokens = jnp.asarray(tiny.tokens())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)

    def attend(queries, keys, values):
        assert queries.shape == (*tokens.shape, cfg.q_heads, cfg.head_dim)
        assert keys.shape == values.shape == (*tokens.shape, cfg.kv_heads, cfg.head_dim)
        return Dense()(queries, keys, values)[0], keys

    x = embed_tokens(params, tokens, cfg)
    apply = jax.jit(lambda layer_params, x: apply_layer(layer_params, x, positions, attend, cfg))
    for layer in range(cfg.layers):
        x, keys = apply(params[f"layer_{layer}"], x)
        assert keys.shape == (*tokens.shape, cfg.kv_heads, cfg.head_dim)
    np.testing.assert_allclose(unembed(params, x, cfg), forward(params, tokens, cfg), atol=2e-5)


def test_bfloat16_weights_compute_in_bfloat16_and_give_float32_logits() -> None:
    cfg = PRESETS["tiny"]
    params = init_params(jax.random.key(0), cfg, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = forward(params, jnp.asarray(tiny.tokens()), cfg)
    assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_their_names(name: str) -> None:
    shapes = jax.eval_shape(lambda key: init_params(key, PRESETS[name], jnp.bfloat16), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    published = {"tiny": 87120, "smollm2-135m": 134.5e6, "llama3-8b": 8.03e9, "qwen2.5-7b": 7.62e9}
    published |= {"qwen2.5-14b": 14.8e9, "qwen2.5-32b": 32.8e9, "qwen2.5-72b": 72.7e9, "llama3-70b": 70.6e9}
    published["qwen2.5-7b-128k"] = published["qwen2.5-7b"]  # its RoPE alone differs
    assert count == pytest.approx(published[name], rel=0.02)
