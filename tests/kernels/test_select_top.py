"""select_top: exact top-budget by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.select_top import counting, mask_top, select_top

# jitted once: called eagerly, the loops inside would be compiled again for every example
jitted_select = jax.jit(select_top, static_argnums=(2, 3, 4))
jitted_mask = jax.jit(mask_top, static_argnums=2)


def choose_by_sorting(ranks, budget):
    """Positions by (rank, position), both descending: Python's own sort."""
    order = sorted((int(rank), place) for place, rank in enumerate(ranks) if rank > 0)
    return sorted(place for _, place in order[::-1][:budget])


def check_rows(ranks, budgets, max_budget, rank_bits):
    places, is_real = jitted_select(ranks, budgets, max_budget, rank_bits)
    mask = np.asarray(jitted_mask(ranks, budgets, rank_bits))
    for row in np.ndindex(budgets.shape):
        expected = choose_by_sorting(ranks[row], budgets[row])
        assert np.asarray(places)[row][np.asarray(is_real)[row]].tolist() == expected
        assert np.flatnonzero(mask[row]).tolist() == expected


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_selection_equals_sorting_on_any_input(data):
    kv_len = data.draw(st.sampled_from([1, 33, 96]))
    rank_bits = data.draw(st.sampled_from([3, 32]))
    most = data.draw(st.sampled_from([1, 2, 2**rank_bits - 1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ranks = rng.integers(0, min(most, 2**rank_bits - 1), (2, 3, kv_len), dtype=np.uint32, endpoint=True)
    budgets = rng.integers(0, kv_len, (2, 3), dtype=np.int32, endpoint=True)
    check_rows(ranks, budgets, kv_len, rank_bits)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64), st.integers(0, 64))
def test_selection_equals_sorting_on_adversarial_ranks(ranks, budget):
    check_rows(np.array([ranks], np.uint32), np.array([budget], np.int32), 64, 32)


@pytest.mark.parametrize("digit_bits", [1, 2, 4, 8])
@pytest.mark.slow
def test_the_cut_does_not_depend_on_how_many_bits_a_pass_finds(digit_bits):
    rng = np.random.default_rng(0)
    ranks = jnp.asarray(rng.integers(0, 2**15, (3, 256), dtype=np.uint32))
    budgets = jnp.asarray([1, 40, 256], jnp.int32)
    cut = counting.find_cut(ranks, budgets, 15, digit_bits)
    expected = np.sort(np.asarray(ranks), axis=-1)[np.arange(3), 256 - np.asarray(budgets)]
    np.testing.assert_array_equal(cut.threshold, np.maximum(expected, 1))


def test_equal_ranks_go_to_the_newest():
    ranks = jnp.asarray([[5, 7, 5, 5, 0, 5, 9, 0]], jnp.uint32)
    places, is_real = jitted_select(ranks, jnp.asarray([4]), 6, 4)
    assert places[is_real].tolist() == [1, 3, 5, 6]
    assert is_real.tolist() == [[True] * 4 + [False] * 2]


def test_a_row_of_equal_ranks_gives_its_end():
    places, is_real = jitted_select(jnp.full((1, 96), 3, jnp.uint32), jnp.asarray([33]), 40, 2)
    assert places[is_real].tolist() == list(range(63, 96))


def test_bad_widths_and_budgets_are_refused():
    with pytest.raises(InputError, match="rank_bits is 33"):
        select_top(jnp.zeros((2, 32), jnp.uint32), jnp.zeros((2,), jnp.int32), 4, 33)
    with pytest.raises((InputError, TypeError)):
        select_top(jnp.zeros((2, 32), jnp.uint32), jnp.zeros((3,), jnp.int32), 4, 32)
