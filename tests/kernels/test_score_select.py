"""score_select: the fused kernels against sorting, on the interpreter here and compiled where there is a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.score_select import score_select
from spotlight_jax.kernels.score_select.config import CONFIGS
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.weights import WeightBounds

STATIC = ("max_budget", "bounds", "sink_tokens", "recent_tokens")
REAL = WeightBounds(127, 1020)


def compiled(run):
    """The call with weights of any integers."""
    call = jax.jit(run, static_argnames=STATIC)
    return lambda codes, weights, *args, **static: call(codes, jnp.asarray(weights, jnp.int8), *args, **static)


kernels = compiled(functools.partial(score_select_pallas_triton, interpret=True))
reference = compiled(functools.partial(score_select, impl="reference"))


def choose_by_numpy(codes, weights, end, budget, sinks, recent):
    """One row: bits by numpy, Python's own sort, forced tokens first, then the best, then the newest."""
    bits = np.unpackbits(codes.astype("<u4").T.copy().view(np.uint8), axis=1, bitorder="little")
    weights = weights.astype(np.int64)
    scores = (weights @ bits.astype(np.int64).T - weights.sum(axis=1, keepdims=True) // 2).max(axis=0)
    order = sorted((place < sinks or place >= end - recent, scores[place], place) for place in range(end))
    return sorted(place for _, _, place in order[::-1][:budget])


def draw_call(seed, batch, code_heads, heads, sums, bits, kv_len, bounds, is_tied):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**32, (batch, code_heads, bits // 32, kv_len), dtype=np.uint32)
    if is_tied:
        codes &= np.uint32(0x10001)  # few different scores
    weights = rng.integers(-bounds.limit, bounds.limit, (batch, heads, sums, bits), endpoint=True)
    weights = np.where(weights < 0, -1, 1) if bounds.limit == 1 else weights  # as bounds of one bit say
    room = bounds.total / np.maximum(np.abs(weights).sum(axis=-1, keepdims=True), bounds.total)
    return codes, np.trunc(weights * room).astype(np.int32), rng


SIGNS = WeightBounds(7, 7 * 128)
CALLS = {
    "int8, two heads a code": (2, 2, 4, 1, 64, 1300, REAL, False, 60, 0, 1),
    "two sums": (2, 2, 4, 2, 128, 1300, REAL, False, 60, 0, 1),
    "signs of a group, ties, sinks": (1, 2, 2, 1, 128, 1100, SIGNS, True, 600, 4, 64),
    "256 bits": (3, 1, 2, 1, 256, 2500, REAL, False, 40, 2, 5),
    "one sign, all ties": (1, 1, 1, 1, 32, 2100, WeightBounds(1, 32), True, 100, 0, 1),
    "int8, several steps": (3, 1, 2, 1, 64, 9100, REAL, False, 700, 3, 30),
    "two sums, several chunks": (3, 1, 2, 2, 64, 40000, REAL, False, 700, 3, 30),
    "signs of a large group, 12 bits of ranks": (1, 1, 2, 1, 256, 5000, WeightBounds(8, 2048), False, 300, 1, 9),
    "ties over several steps": (3, 1, 2, 2, 96, 12288, SIGNS, True, 5000, 0, 1),
}
RUNS = {"kernels": kernels, "xla": compiled(functools.partial(score_select, impl="xla")), "reference": reference}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CALLS)
def test_all_choose_as_sorting_does(run, name):
    *shape, is_tied, most, sinks, recent = CALLS[name]
    batch, code_heads, heads, _, _, kv_len, bounds = shape
    codes, weights, rng = draw_call(1, *shape, is_tied)
    ends = rng.integers(kv_len // 3, kv_len, batch, endpoint=True).astype(np.int32)
    budgets = rng.integers(min(sinks + recent, most), most, batch, endpoint=True).astype(np.int32)
    always = {"sink_tokens": sinks, "recent_tokens": recent}
    places, is_real = RUNS[run](codes, weights, ends, budgets, max_budget=most, bounds=bounds, **always)
    for row in np.ndindex(batch, heads):
        sequence, code_head = row[0], row[1] // (heads // code_heads)
        call = codes[sequence, code_head], weights[row], ends[sequence], budgets[sequence], sinks, recent
        assert np.asarray(places)[row][np.asarray(is_real)[row]].tolist() == choose_by_numpy(*call)
        assert not np.asarray(places)[row][~np.asarray(is_real)[row]].any()
    np.testing.assert_array_equal(is_real[:, 0].sum(axis=-1), budgets)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    "sums, best_first",
    [([0, 1], [3, 1, 2, 0]), ([0, 0], [3, 1, 0, 2]), ([1, 1], [1, 2, 0, 3])],  # -1, 3, 2, 5; -2, 0, -3, 5; -1, 3, 2, -2
)
def test_the_higher_of_two_sums_chooses_by_hand(run, sums, best_first):
    """Half of the first sum's weights is 3, of the second's -2; token 4 is the query's own."""
    codes = np.array([0b011, 0b110, 0b000, 0b101, 0b000], np.uint32).reshape(1, 1, 1, 5)
    weights = np.zeros((1, 1, 2, 32), np.int32)
    weights[..., :3] = np.array([[3, -2, 5], [-4, 1, 0]])[sums]
    for budget in range(2, 6):
        places, _ = run(codes, weights, np.int32([5]), np.int32([budget]), max_budget=5, bounds=REAL)
        assert places[0, 0, :budget].tolist() == sorted([4, *best_first[: budget - 1]])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("bounds", [REAL, SIGNS])
def test_the_most_extreme_weights_are_summed_exactly(run, bounds):
    """Codes from one end of the scores to the other, two next to each other apart by one weight."""
    rng = np.random.default_rng(6)
    sizes = np.zeros(128, np.int32)
    full, rest = divmod(bounds.total, bounds.limit)
    sizes[:full], sizes[full : full + 1] = bounds.limit, rest
    weights = np.stack([sizes * rng.choice([-1, 1], 128), -sizes])[None, None].astype(np.int32)
    bits = np.tril(np.ones((129, 128), bool), -1) ^ (weights[0, 0, 0] <= 0)  # token t: the first t places are wrong
    bits[100:128] ^= rng.random((28, 128)) < 0.5
    codes = np.packbits(bits[rng.permutation(129)], axis=1, bitorder="little").view("<u4").T[None, None]
    for sums, budget in itertools.product((weights, weights[:, :, [0, 0]]), (2, 5, 40, 129)):
        places, _ = run(codes, sums, np.int32([129]), np.int32([budget]), max_budget=129, bounds=bounds)
        assert places[0, 0, :budget].tolist() == choose_by_numpy(codes[0, 0], sums[0, 0], 129, budget, 0, 1)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_the_kernels_equal_the_reference_whatever_is_cached(data):
    end = data.draw(st.integers(1, 1500))
    codes, weights, _ = draw_call(
        data.draw(st.integers(0, 2**32 - 1)), 1, 1, 2, 2, 64, 1500, REAL, data.draw(st.booleans())
    )
    if data.draw(st.booleans()):
        weights[:] = data.draw(st.sampled_from([-15, 0, 15]))
    call = jnp.asarray(codes), jnp.asarray(weights), jnp.asarray([end]), jnp.asarray([data.draw(st.integers(1, 200))])
    found, expected = (run(*call, max_budget=200, bounds=REAL) for run in (kernels, reference))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows, kv_len", [(1, 100), (4, 131072), (4, 524288), (32, 131072), (3, 2**21)])
def test_a_row_has_few_chunks_and_a_chunk_fits_16_bit_counts(rows, kv_len):
    for cfg in CONFIGS.values():
        chunk = cfg.choose_chunk(rows, kv_len)
        assert chunk == cfg.step or (chunk % cfg.wide_step == 0 and cfg.wide_step % cfg.step == 0)
        assert chunk <= 15 * 1024 and -(-kv_len // chunk) <= 256


def test_the_longest_chunk_counts_ties_of_every_token():
    """Counts of ties pass 2^13; one chunk is cut among its ties."""
    cfg = CONFIGS[None]
    kv_len = 27 * cfg.longest_chunk
    codes, weights = jnp.zeros((1, 1, 1, kv_len), jnp.uint32), jnp.ones((1, 16, 1, 32), jnp.int32)
    assert cfg.choose_chunk(16, kv_len) == cfg.longest_chunk
    bounds, budget = WeightBounds(1, 32), 40000
    places, _ = kernels(codes, weights, jnp.asarray([kv_len]), jnp.asarray([budget]), max_budget=budget, bounds=bounds)
    np.testing.assert_array_equal(places[0], np.tile(np.arange(kv_len - budget, kv_len), (16, 1)))


def test_shapes_that_do_not_fit_are_refused():
    codes, weights, _ = draw_call(0, 1, 2, 3, 2, 64, 40, REAL, False)
    codes, weights, one = jnp.asarray(codes), jnp.asarray(weights, jnp.int8), jnp.ones((1,), jnp.int32)
    with pytest.raises(InputError, match="multiple of code_heads"):
        score_select(codes, weights, one, one, 4, REAL)
    with pytest.raises(InputError, match="do not fit int8"):
        score_select(codes, weights[:, :2], one, one, 4, WeightBounds(128, 1020), impl="pallas_triton")
    with pytest.raises(InputError, match="need more than 12 bits"):
        score_select(codes, weights[:, :2], one, one, 4, WeightBounds(127, 4096), impl="pallas_triton")
    with pytest.raises(InputError, match="do not fit: batch"):
        score_select(codes, weights[:, :2, :, :32], one, one, 4, REAL)
