"""Selection: budgets, tokens always read, and one choice for decoding and teacher-forced evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector import selection
from spotlight_jax.selector.selection import budget_of, max_budget, share_read, sparse_from
from spotlight_jax.weights import WeightBounds

BATCH, HEADS, MAX_LEN = 2, 3, 96
RANGE = (-50, 50)

# jitted once: called eagerly, the loops inside would be compiled again for every example
select_tokens = jax.jit(selection.select_tokens, static_argnums=(2, 3))
select_mask = jax.jit(selection.select_mask, static_argnums=(2, 3))
select_by_codes = jax.jit(selection.select_by_codes, static_argnums=(2, 4))


def choose_by_sorting(scores, length, cfg):
    """Always-read tokens first, newest first; then by score, newest first; then cut."""
    budget = int(budget_of(length, cfg))

    def rank(place):
        is_always_read = place < cfg.sink_tokens or place >= length - max(cfg.recent_tokens, 1)
        return (is_always_read, 0 if is_always_read else scores[place], place)

    return sorted(sorted(range(length), key=rank, reverse=True)[:budget])


@pytest.mark.parametrize("keep", [0.02, 0.05, 0.1, 0.5])
def test_a_shares_budget_is_the_papers_at_every_length(keep):
    lengths = np.arange(1, 200_000, 7)
    expected = [max(n - int((1 - keep) * n), min(20, n)) for n in lengths.tolist()]
    np.testing.assert_array_equal(budget_of(jnp.asarray(lengths), SelectionConfig(keep=keep)), expected)


def test_budgets_are_exact_at_a_million_tokens():
    assert int(budget_of(1_000_000, SelectionConfig(keep=0.02))) == 20_000
    assert int(budget_of(1_048_576, SelectionConfig(keep=0.02))) == 1_048_576 - int(0.98 * 1_048_576)
    assert max_budget(2_000_000, SelectionConfig(keep=1.0)) == 2_000_000


@pytest.mark.parametrize(
    ("cfg", "length", "expected"),
    [
        (SelectionConfig(keep=1.0), 77, 77),
        (SelectionConfig(budget=1024), 5000, 1024),
        (SelectionConfig(budget=1024), 500, 500),
        (SelectionConfig(keep=0.02, min_tokens=20), 100, 20),
        (SelectionConfig(keep=0.02, min_tokens=0), 1, 1),
        (SelectionConfig(keep=0.02, sink_tokens=4, recent_tokens=64), 1000, 68),
    ],
)
def test_budgets_by_hand(cfg, length, expected):
    assert int(budget_of(length, cfg)) == expected


@given(st.integers(0, 2**32 - 1), st.sampled_from([(0, 0), (3, 0), (0, 5), (2, 4)]), st.booleans())
def test_selection_equals_sorting(seed, always, is_float):
    rng = np.random.default_rng(seed)
    cfg = SelectionConfig(keep=0.1, min_tokens=7, sink_tokens=always[0], recent_tokens=always[1])
    lengths = rng.integers(1, MAX_LEN, BATCH, endpoint=True)
    scores = rng.integers(*RANGE, (BATCH, HEADS, MAX_LEN), dtype=np.int32)
    if is_float:
        scores = scores.astype(np.float32) / 7
    places, is_real = select_tokens(
        jnp.asarray(scores), jnp.asarray(lengths, jnp.int32), cfg, None if is_float else RANGE
    )
    for sequence, head in np.ndindex(BATCH, HEADS):
        chosen = np.asarray(places)[sequence, head][np.asarray(is_real)[sequence, head]].tolist()
        assert chosen == choose_by_sorting(scores[sequence, head], int(lengths[sequence]), cfg)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]))
def test_selection_by_codes_sorts_by_the_highest_sum_less_its_half(seed, sums):
    rng = np.random.default_rng(seed)
    cfg, bounds = SelectionConfig(keep=0.1, min_tokens=7, sink_tokens=2), WeightBounds(127, 640)
    lengths = rng.integers(1, MAX_LEN, BATCH, endpoint=True).astype(np.int32)
    codes = rng.integers(0, 2**32, (BATCH, HEADS, 2, MAX_LEN), dtype=np.uint32)
    weights = rng.integers(-10, 11, (BATCH, 2 * HEADS, sums, 64)).astype(np.int32)
    bits = np.stack([codes[:, :, bit // 32] >> np.uint32(bit % 32) & 1 for bit in range(64)], axis=2).astype(int)
    bits = np.repeat(bits, 2, axis=1)  # two selecting heads read one code
    scores = (weights @ bits - weights.sum(-1, keepdims=True) // 2).max(2)
    places, is_real = (np.asarray(x) for x in select_by_codes(codes, weights, bounds, lengths, cfg))
    for sequence, head in np.ndindex(BATCH, 2 * HEADS):
        chosen = places[sequence, head][is_real[sequence, head]].tolist()
        assert chosen == choose_by_sorting(scores[sequence, head], int(lengths[sequence]), cfg)


@pytest.mark.parametrize("cfg", [SelectionConfig(keep=0.1, min_tokens=4), SelectionConfig(budget=9, sink_tokens=2)])
def test_many_queries_at_once_select_what_single_steps_select(cfg):
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (BATCH, MAX_LEN, HEADS, MAX_LEN), dtype=np.int32)  # many ties
    positions = jnp.broadcast_to(jnp.arange(MAX_LEN, dtype=jnp.int32)[None, :], (BATCH, MAX_LEN))
    mask = np.asarray(select_mask(jnp.asarray(scores), positions, cfg, (-3, 3)))
    for step in range(MAX_LEN):
        lengths = jnp.full((BATCH,), step + 1, jnp.int32)
        places, is_real = select_tokens(jnp.asarray(scores[:, step]), lengths, cfg, (-3, 3))
        for sequence, head in np.ndindex(BATCH, HEADS):
            chosen = np.asarray(places)[sequence, head][np.asarray(is_real)[sequence, head]]
            assert np.flatnonzero(mask[sequence, step, head]).tolist() == chosen.tolist()


def test_the_new_token_always_sees_itself():
    scores = jnp.full((1, 1, 64), 5, jnp.int32).at[0, 0, 40].set(-5)
    places, is_real = select_tokens(scores, jnp.asarray([41]), SelectionConfig(budget=1), (-5, 5))
    assert places[is_real].tolist() == [40]


def test_slots_past_the_length_are_never_selected():
    scores = jnp.zeros((1, 1, 64), jnp.int32).at[0, 0, 30:].set(50)
    places, is_real = select_tokens(scores, jnp.asarray([30]), SelectionConfig(budget=12), RANGE)
    assert places[is_real].tolist() == list(range(18, 30))


def test_the_papers_rule_makes_the_first_queries_dense():
    scores = jnp.zeros((1, 100, 1, 100), jnp.int32)
    positions = jnp.arange(100, dtype=jnp.int32)[None]
    cfg = SelectionConfig(keep=0.3, min_tokens=1)
    budgets = jnp.broadcast_to(budget_of(100, cfg), positions.shape)
    total = np.asarray(select_mask(scores, positions, cfg, (0, 0), budgets))[0, :, 0]
    np.testing.assert_array_equal(total.sum(-1), np.minimum(np.arange(1, 101), 30))
    own = np.asarray(select_mask(scores, positions, cfg, (0, 0)))[0, :, 0]
    np.testing.assert_array_equal(own.sum(-1), [n - 7 * n // 10 for n in range(1, 101)])


def test_extreme_floats_keep_their_order():
    scores = jnp.asarray([[[-jnp.inf, 3e38, -0.0, 0.0, jnp.inf, -3e38, 1e-40, -2.0]]], jnp.float32)
    cfg = SelectionConfig(budget=4)
    places, is_real = select_tokens(scores, jnp.asarray([8]), cfg)
    assert places[is_real].tolist() == [1, 4, 6, 7]  # the newest, inf, 3e38, and the least positive number
    tied = jnp.asarray([[[0.0, -0.0, -5.0]]], jnp.float32)
    places, is_real = select_tokens(tied, jnp.asarray([3]), SelectionConfig(budget=2))
    assert places[is_real].tolist() == [1, 2]  # zeros tie, so the newer one wins


def test_where_sparse_reading_starts():
    assert sparse_from(SelectionConfig(min_context=0), 1, "cpu") == 21
    assert sparse_from(SelectionConfig(min_context=500), 4, "cpu") == 500
    assert sparse_from(SelectionConfig(budget=1024, min_context=0), 1, "gpu") == 1025
    assert sparse_from(SelectionConfig(), 8, "gpu") * 8 == sparse_from(SelectionConfig(), 1, "gpu")
    assert sparse_from(SelectionConfig(keep=1.0, min_context=0), 1, "cpu") > 2_000_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.01}, "keep is 1.01"),
        ({"keep": -0.5}, "keep is -0.5"),
        ({"budget": 0}, "budget is 0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"budget": 60, "sink_tokens": 4, "recent_tokens": 64}, "cannot hold 4 sink and 64 recent"),
        ({"min_context": -3}, "min_context is -3"),
        ({"dense_layers": (0, -1)}, "dense_layers"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SelectionConfig(**fields)


def test_integer_scores_without_bounds_are_refused():
    with pytest.raises(InputError, match="score_range"):
        select_tokens(jnp.zeros((1, 1, 8), jnp.int32), jnp.asarray([8]), SelectionConfig())


def test_the_share_read_counts_the_least_number_of_tokens():
    """256 queries over 2, 4, ..., 512 tokens read 2 + 4 + ... + 20 and then 20 each, of 65,792 in all."""
    lengths = np.arange(2, 514, 2, dtype=np.int32)
    assert share_read(lengths, SelectionConfig(keep=0.02)) == pytest.approx((110 + 246 * 20) / 65_792)
    assert share_read(lengths, SelectionConfig(keep=1.0)) == 1
