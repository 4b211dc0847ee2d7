"""Drawing tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax import sampling
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError
from spotlight_jax.sampling import keep_top_p

VOCAB = 50
sample = jax.jit(sampling.sample, static_argnums=2)


def draw(logits, cfg, count):
    keys = jax.random.split(jax.random.key(cfg.seed), count)
    return np.asarray(sample(jnp.broadcast_to(logits, (count, VOCAB)), keys, cfg))


def logits_of(seed):
    return jax.random.normal(jax.random.key(seed), (1, VOCAB)) * 2


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("cfg", [SamplingConfig(), SamplingConfig(1.0), SamplingConfig(1.0, top_k=3, top_p=0.9)])
def test_logits_that_are_not_finite_choose_no_token(wrong, cfg):
    logits = jnp.concatenate([logits_of(0), logits_of(1).at[0, 7].set(wrong)])
    tokens = np.asarray(sample(logits, jax.random.split(jax.random.key(0), 2), cfg))
    assert tokens[0] >= 0 and tokens[1] == sampling.NOT_FINITE
    sampling.check_chosen(tokens[:1])
    with pytest.raises(InputError, match=r"logits are not finite"):
        sampling.check_chosen(tokens)


def test_temperature_zero_takes_the_most_probable():
    logits = logits_of(0)
    assert set(draw(logits, SamplingConfig(), 5)) == {int(jnp.argmax(logits))}


def test_draws_follow_the_probabilities():
    logits = logits_of(1)
    counts = np.bincount(draw(logits, SamplingConfig(temperature=0.7), 20_000), minlength=VOCAB)
    expected = np.asarray(jax.nn.softmax(logits[0] / 0.7))
    np.testing.assert_allclose(counts / 20_000, expected, atol=4 * np.sqrt(expected.max() / 20_000))


def test_top_k_draws_only_from_the_most_probable():
    logits = logits_of(2)
    drawn = set(draw(logits, SamplingConfig(temperature=3.0, top_k=4), 2000))
    assert drawn == set(np.argsort(np.asarray(logits[0]))[-4:].tolist())


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_hold_it(seed, top_p):
    logits = np.random.default_rng(seed).normal(size=(2, VOCAB)).astype(np.float32) * 3
    kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), top_p)))
    for row in range(2):
        shares = np.exp(logits[row].astype(np.float64))
        shares /= shares.sum()
        order = np.argsort(-shares)
        needed = int(np.searchsorted(np.cumsum(shares[order]), top_p - 1e-6)) + 1
        slack = int(np.searchsorted(np.cumsum(shares[order]), top_p + 1e-6)) + 1
        assert needed <= kept[row].sum() <= slack
        assert set(np.flatnonzero(kept[row])) == set(order[: kept[row].sum()].tolist())


def test_the_same_seed_draws_the_same():
    cfg = SamplingConfig(temperature=1.0, top_p=0.9, seed=3)
    np.testing.assert_array_equal(draw(logits_of(3), cfg, 20), draw(logits_of(3), cfg, 20))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SamplingConfig(**fields)
