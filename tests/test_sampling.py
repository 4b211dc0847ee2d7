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
from spotlight_jax.sampling import Sampling, batch_sampling, keep_top_k, keep_top_p

VOCAB = 50
sample = jax.jit(sampling.sample)


def draw(logits, cfg, count):
    """The first `count` draws of one sequence."""
    one = batch_sampling([cfg], [0])
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), one)
    return np.asarray(sample(jnp.broadcast_to(logits, (count, VOCAB)), many, jnp.arange(count)))


def logits_of(seed):
    return jax.random.normal(jax.random.key(seed), (1, VOCAB)) * 2


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("cfg", [SamplingConfig(), SamplingConfig(1.0), SamplingConfig(1.0, top_k=3, top_p=0.9)])
def test_logits_that_are_not_finite_choose_no_token(wrong, cfg):
    logits = jnp.concatenate([logits_of(0), logits_of(1).at[0, 7].set(wrong)])
    tokens = np.asarray(sample(logits, batch_sampling([cfg] * 2, [0, 1]), jnp.zeros(2, jnp.int32)))
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
    kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), jnp.full(2, top_p, jnp.float32))))
    for row in range(2):
        shares = np.exp(logits[row].astype(np.float64))
        shares /= shares.sum()
        order = np.argsort(-shares)
        needed = int(np.searchsorted(np.cumsum(shares[order]), top_p - 1e-6)) + 1
        slack = int(np.searchsorted(np.cumsum(shares[order]), top_p + 1e-6)) + 1
        assert needed <= kept[row].sum() <= slack
        assert set(np.flatnonzero(kept[row])) == set(order[: kept[row].sum()].tolist())


@given(st.integers(0, 2**32 - 1), st.integers(0, VOCAB + 3))
def test_top_k_keeps_the_highest_and_what_ties_with_the_last(seed, top_k):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 4, (2, VOCAB)).astype(np.float32) * rng.choice([1.0, -0.0, 1e-30, 1e30])
    kept = np.isfinite(np.asarray(keep_top_k(jnp.asarray(logits), jnp.asarray([top_k, 3], jnp.int32))))
    for row, count in enumerate((top_k or VOCAB, 3)):
        least = np.sort(logits[row])[-min(count, VOCAB)]
        np.testing.assert_array_equal(kept[row], logits[row] >= least)


def test_each_sequence_of_a_batch_draws_as_it_does_alone():
    configs = [
        SamplingConfig(),
        SamplingConfig(0.7, seed=3),
        SamplingConfig(1.5, top_k=4, seed=3),
        SamplingConfig(1.0, top_p=0.5, seed=8),
        SamplingConfig(2.0, top_k=9, top_p=0.8, seed=1),
    ]
    logits, numbers, draws = jax.random.normal(jax.random.key(4), (5, VOCAB)) * 2, [0, 2, 0, 5, 1], [9, 0, 4, 4, 7]
    together = sample(logits, batch_sampling(configs, numbers), jnp.asarray(draws))
    for row, (cfg, number, draw) in enumerate(zip(configs, numbers, draws, strict=True)):
        alone = sample(logits[row : row + 1], batch_sampling([cfg], [number]), jnp.asarray([draw]))
        assert int(alone[0]) == int(together[row])
    assert isinstance(batch_sampling(configs, numbers), Sampling)


def test_sequences_of_one_seed_draw_apart():
    cfg, logits = SamplingConfig(1.0, seed=3), jnp.zeros((2, VOCAB))
    drawn = [sample(logits, batch_sampling([cfg] * 2, [0, 1]), jnp.full(2, draw)) for draw in range(8)]
    first, second = np.asarray(drawn).T
    assert not np.array_equal(first, second)


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
