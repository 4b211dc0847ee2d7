import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.models.config import RopeConfig
from spotlight_jax.models.rope import apply_rope, rope_angles, rope_frequencies


def test_rotation_turns_complex_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 3, 2, 9000]], np.int32)
    ours = apply_rope(jnp.asarray(x), rope_angles(jnp.asarray(positions), 8, RopeConfig(theta=500.0)))
    turn = np.exp(1j * positions[:, :, None, None] * 500.0 ** (-np.arange(4) / 4))
    turned = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=3e-3)
    np.testing.assert_allclose(ours[0], np.concatenate([turned.real, turned.imag], -1)[0], atol=1e-5)


def test_linear_scaling_is_a_plain_rotation_of_divided_positions() -> None:
    positions = jnp.array([[4, 8, 400]], jnp.int32)
    scaled = rope_angles(positions, 6, RopeConfig("linear", factor=4.0))
    np.testing.assert_allclose(scaled[1], rope_angles(positions // 4, 6, RopeConfig())[1], atol=1e-5)


def test_dynamic_scaling_starts_past_the_trained_length() -> None:
    positions = jnp.array([[0, 1, 15]], jnp.int32)
    cfg = RopeConfig("dynamic", factor=2.0, trained_len=16)
    plain, short, long = (
        rope_angles(positions, 8, *arguments)[1] for arguments in ((RopeConfig(),), (cfg, 16), (cfg, 32))
    )
    np.testing.assert_allclose(short, plain, atol=1e-5)
    assert float(jnp.abs(long - plain).max()) > 0.01


def test_dynamic_scaling_adapts_to_each_sequence() -> None:
    cfg = RopeConfig("dynamic", theta=500.0, factor=2.0, trained_len=16)
    positions = jnp.array([[0, 3, 9], [40, 41, 63]], jnp.int32)
    by_positions, by_lengths = rope_angles(positions, 8, cfg)[1], rope_angles(positions, 8, cfg, jnp.array([10, 64]))[1]
    np.testing.assert_array_equal(by_positions, by_lengths)
    for row, length in enumerate((10, 64)):
        base = 500.0 * max(1.0, 2 * length / 16 - 1) ** (8 / 6)  # factor * length / trained - (factor - 1)
        angles = np.asarray(positions[row])[:, None] * base ** (-np.arange(4) / 4)
        np.testing.assert_allclose(by_lengths[row], np.sin(angles), atol=2e-5)
        np.testing.assert_array_equal(rope_angles(positions[row : row + 1], 8, cfg, length)[1][0], by_lengths[row])


def test_llama3_keeps_short_waves_and_slows_long_ones() -> None:
    cfg = RopeConfig("llama3", theta=500000.0, factor=8.0, trained_len=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    ours, factor = rope_frequencies(128, cfg)
    plain, _ = rope_frequencies(128, RopeConfig(theta=500000.0))
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ours[waves < 8192 / 4], plain[waves < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(ours[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    assert factor == 1.0


def test_yarn_stretches_cosines_by_the_published_factor() -> None:
    _, factor = rope_frequencies(64, RopeConfig("yarn", factor=16.0, trained_len=4096))
    assert factor == pytest.approx(0.1 * np.log(16) + 1)
    _, factor = rope_frequencies(64, RopeConfig("yarn", factor=16.0, trained_len=4096, mscale=1.0, mscale_all_dim=1.0))
    assert factor == 1.0


def test_divisors_slow_each_pair() -> None:
    ours, _ = rope_frequencies(6, RopeConfig(divisors=(1.0, 2.0, 8.0)))
    plain, _ = rope_frequencies(6, RopeConfig())
    np.testing.assert_allclose(plain / ours, [1, 2, 8], rtol=1e-6)


def test_angles_of_far_positions_are_exact() -> None:
    """Within what float32 positions times frequencies allow: 2**-24 of the angle."""
    positions = jnp.array([[100_000, 131_071]], jnp.int32)
    cos, sin = rope_angles(positions, 64, RopeConfig(theta=1e6))
    angles = np.asarray(positions, np.float64)[:, :, None] * 1e6 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=131_071 * 2**-23)
    np.testing.assert_allclose(sin, np.sin(angles), atol=131_071 * 2**-23)
