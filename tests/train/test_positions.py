import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import config_from_hf
from spotlight_jax.models.decoder import apply_layer, init_params
from spotlight_jax.models.embedded import EMBEDDED
from spotlight_jax.models.load import load_config
from spotlight_jax.models.runner import Dense
from tests.models import tiny
from train.config import LayerwiseConfig, lengths_covered
from train.positions import PIECES, draw_positions, far_positions


def test_positions_are_a_function_of_seed_and_number_ascend_and_stay_below_the_length():
    drawn = [draw_positions(64, 1000, 3, number) for number in range(200)]
    for number, positions in enumerate(drawn):
        np.testing.assert_array_equal(positions, draw_positions(64, 1000, 3, number))
        assert (np.diff(positions) >= 1).all() and positions[0] >= 0 and positions[-1] < 1000
        assert np.sum(np.diff(positions) > 1) <= PIECES - 1
    assert not np.array_equal(drawn[0], draw_positions(64, 1000, 4, 0))
    seen = np.concatenate(drawn) // 100
    counts = np.bincount(seen, minlength=10)
    assert counts.min() > 0.5 * counts.mean()  # every part of the context is seen
    distances = np.concatenate([positions[-1:] - positions[:1] for positions in drawn])
    assert distances.max() > 900  # farther than the window is long


def test_a_window_as_long_as_the_context_stands_where_it_always_did():
    np.testing.assert_array_equal(draw_positions(64, 64, 3, 7), np.arange(64))
    np.testing.assert_array_equal(far_positions(64, 64), np.arange(64))


def test_far_positions_reach_from_the_start_to_the_very_end():
    positions = far_positions(64, 1000)
    assert positions[0] == 0 and positions[-1] == 999 and (np.diff(positions) >= 1).all()


@pytest.mark.parametrize("name", ["llama2", "llama_linear", "llama31", "llama_yarn", "llama_dynamic", "qwen3_yarn"])
def test_an_offset_leaves_a_layers_outputs_as_they_are_for_every_kind_of_rope(name):
    cfg = config_from_hf(tiny.CASES[name])
    params = init_params(jax.random.key(0), cfg)["layer_0"]
    x = jax.random.normal(jax.random.key(1), (2, 24, cfg.embed))
    places = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], (2, 24))
    apply = jax.jit(lambda positions: apply_layer(params, x, positions, Dense(), cfg, 64)[0])
    outputs = [apply(places + offset) for offset in (0, 5, 40)]
    for moved in outputs[1:]:
        np.testing.assert_allclose(moved, outputs[0], atol=2e-5)


def test_the_length_covered_is_the_models_context_with_its_scaling_the_windows_or_a_number():
    model = dataclasses.replace(config_from_hf(tiny.CASES["llama_yarn"]), max_len=4096)
    model = dataclasses.replace(model, rope=dataclasses.replace(model.rope, factor=4.0, trained_len=4096))
    cfg = LayerwiseConfig(data=dataclasses.replace(LayerwiseConfig().data, window=2048))
    assert lengths_covered(cfg, model)[-1] == 16384
    assert lengths_covered(dataclasses.replace(cfg, length="window"), model) == (2048,)
    assert lengths_covered(dataclasses.replace(cfg, length=5000), model)[-1] == 5000
    with pytest.raises(InputError, match="--length 16385 is more than the 16384 tokens"):
        lengths_covered(dataclasses.replace(cfg, length=16385), model)
    with pytest.raises(InputError, match="length is 100, less than the 2048 tokens of a window"):
        dataclasses.replace(cfg, length=100)


def test_hash_functions_are_trained_for_lengths_a_step_apart_from_the_window_to_the_length():
    model = dataclasses.replace(config_from_hf(tiny.CASES["llama3"]), max_len=131_072)

    def lengths(**fields):
        data = dataclasses.replace(LayerwiseConfig().data, window=8192)
        return lengths_covered(LayerwiseConfig(data=data, **fields), model)

    assert lengths() == (8192, 32_768, 131_072)
    assert lengths(length=32_768) == (8192, 32_768)
    assert lengths(length=32_768, length_step=2) == (8192, 16_384, 32_768)
    assert lengths(length=40_960) == (8192, 40_960)  # the nearest number of steps
    assert lengths(length=10_000) == (8192, 10_000)
    assert lengths(length_step=1) == (131_072,)
    assert lengths(length="window") == (8192,)


def test_the_long_variants_are_the_embedded_model_with_a_longer_context():
    plain = load_config("smollm2-135m")
    variants = {
        "smollm2-135m-32k": (EMBEDDED["smollm2-135m-32k"].adapt(plain), 32_768, 418_000.0),  # as `load_config` does:
        "smollm2-135m-128k": (load_config("smollm2-135m-128k"), 131_072, 1_750_000.0),
    }
    for name, (cfg, length, theta) in variants.items():
        assert (cfg.max_context, cfg.rope.theta) == (length, theta)
        assert dataclasses.replace(cfg, max_len=plain.max_len, rope=plain.rope) == plain
        assert EMBEDDED[name].gguf_sha256 == EMBEDDED["smollm2-135m"].gguf_sha256
