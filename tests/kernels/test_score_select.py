"""score_select: the fused kernels against sorting, on the interpreter here and compiled where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.score_select import pack_weights, score_select
from spotlight_jax.kernels.score_select.cases import CASES
from spotlight_jax.kernels.score_select.chunk_programs import STEP, choose_chunk
from spotlight_jax.kernels.score_select.packing import unpack_weights
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.score_select.row_programs import choose_step, has_program_a_row
from tests.kernels.cuda import lower_for_cuda

STATIC = ("max_budget", "limit", "sink_tokens", "recent_tokens")


def packing(run):
    """The call with plain weights."""
    packed = jax.jit(run, static_argnames=STATIC)
    return lambda codes, weights, *args, **static: packed(codes, pack_weights(jnp.asarray(weights)), *args, **static)


chunks, rows = (
    packing(functools.partial(score_select_pallas_triton, interpret=True, has_rows=has_rows))
    for has_rows in (False, True)
)
reference = packing(functools.partial(score_select, impl="reference"))


def choose_by_numpy(codes, weights, end, budget, sinks, recent):
    """One row: bits by numpy, Python's own sort, forced tokens first, then the best, then the newest."""
    bits = np.unpackbits(codes.astype("<u4").T.copy().view(np.uint8), axis=1, bitorder="little")
    scores = bits.astype(np.int64) @ weights.astype(np.int64)
    order = sorted((place < sinks or place >= end - recent, scores[place], place) for place in range(end))
    return sorted(place for _, _, place in order[::-1][:budget])


def draw_call(seed, batch, code_heads, heads, bits, kv_len, limit, is_tied):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**32, (batch, code_heads, bits // 32, kv_len), dtype=np.uint32)
    if is_tied:
        codes &= np.uint32(0x10001)  # few different scores
    weights = rng.integers(-limit, limit, (batch, heads, bits), endpoint=True).astype(np.int32)
    return codes, weights, rng


CALLS = {
    "int8, two heads a code": (2, 2, 4, 64, 1300, 127, False, 60, 0, 1),
    "signs of a group, ties, sinks": (1, 2, 2, 128, 1100, 7, True, 600, 4, 64),
    "256 bits": (3, 1, 2, 256, 2500, 127, False, 40, 2, 5),
    "one sign, all ties": (1, 1, 1, 32, 2100, 1, True, 100, 0, 1),
    "int8, several steps": (3, 1, 2, 64, 9100, 127, False, 700, 3, 30),
    "ties over several steps": (3, 1, 2, 96, 12288, 7, True, 5000, 0, 1),
}
RUNS = {
    "chunks": (chunks, ["int8, two heads a code", "signs of a group, ties, sinks", "one sign, all ties"]),
    "rows": (rows, ["256 bits", "int8, several steps", "ties over several steps"]),
    "reference": (reference, list(CALLS)),
}


@pytest.mark.parametrize("run, name", [(run, name) for run, (_, names) in RUNS.items() for name in names])
def test_all_choose_as_sorting_does(run, name):
    batch, code_heads, heads, bits, kv_len, limit, is_tied, most, sinks, recent = CALLS[name]
    codes, weights, rng = draw_call(1, batch, code_heads, heads, bits, kv_len, limit, is_tied)
    ends = rng.integers(kv_len // 3, kv_len, batch, endpoint=True).astype(np.int32)
    budgets = rng.integers(min(sinks + recent, most), most, batch, endpoint=True).astype(np.int32)
    always = {"sink_tokens": sinks, "recent_tokens": recent}
    places, is_real = RUNS[run][0](codes, weights, ends, budgets, max_budget=most, limit=limit, **always)
    for row in np.ndindex(batch, heads):
        sequence, code_head = row[0], row[1] // (heads // code_heads)
        call = codes[sequence, code_head], weights[row], ends[sequence], budgets[sequence], sinks, recent
        assert np.asarray(places)[row][np.asarray(is_real)[row]].tolist() == choose_by_numpy(*call)
        assert not np.asarray(places)[row][~np.asarray(is_real)[row]].any()
    np.testing.assert_array_equal(is_real[:, 0].sum(axis=-1), budgets)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_the_kernels_equal_the_reference_whatever_is_cached(data):
    end = data.draw(st.integers(1, 1500))
    codes, weights, _ = draw_call(
        data.draw(st.integers(0, 2**32 - 1)), 1, 1, 2, 64, 1500, 127, data.draw(st.booleans())
    )
    if data.draw(st.booleans()):
        weights[:] = data.draw(st.sampled_from([-127, 0, 127]))
    call = jnp.asarray(codes), jnp.asarray(weights), jnp.asarray([end]), jnp.asarray([data.draw(st.integers(1, 200))])
    for found, expected in zip(*(run(*call, max_budget=200, limit=127) for run in (chunks, rows)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows, kv_len", [(1, 100), (4, 131072), (4, 524288), (32, 131072), (3, 2**21)])
def test_a_row_has_few_chunks_and_a_chunk_fits_16_bit_counts(rows, kv_len):
    chunk = choose_chunk(rows, kv_len)
    assert chunk == STEP or (chunk % (2 * STEP) == 0 and chunk <= 15 * STEP)
    assert -(-kv_len // chunk) <= 256


@pytest.mark.parametrize(
    "rows, kv_len, words, is_one",
    [(96, 32768, 4, True), (64, 57344, 4, True), (63, 32768, 4, False), (96, 57345, 4, False), (96, 57344, 8, False)],
)
def test_a_program_owns_a_row_where_rows_are_many_and_fields_hold_their_steps(rows, kv_len, words, is_one):
    assert has_program_a_row(rows, kv_len, words) is is_one
    assert not is_one or -(-kv_len // choose_step(words)) <= 15


def test_the_longest_row_of_a_program_counts_ties_of_every_token():
    """Fields of four bits reach 14, counts of ties pass 2^15."""
    codes, weights = jnp.zeros((1, 1, 1, 57344), jnp.uint32), jnp.ones((1, 1, 32), jnp.int32)
    places, _ = rows(codes, weights, jnp.asarray([57344]), jnp.asarray([12000]), max_budget=12000, limit=1)
    np.testing.assert_array_equal(places[0, 0], np.arange(57344 - 12000, 57344))


def shapes_of(case):
    codes = jax.ShapeDtypeStruct((case.batch, case.code_heads, case.code_bits // 32, case.kv_len), jnp.uint32)
    weights = jax.ShapeDtypeStruct((case.batch, case.heads, case.code_bits // 4), jnp.int32)
    return codes, weights, *(jax.ShapeDtypeStruct((case.batch,), jnp.int32),) * 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_lower_for_cuda_at_every_real_shape(case):
    run = functools.partial(score_select, max_budget=case.budget, limit=case.limit)
    text = lower_for_cuda(run, *shapes_of(case))
    is_one = has_program_a_row(case.batch * case.heads, case.kv_len, case.code_bits // 32)
    kernels = ["select_rows"] if is_one else ["score_ranks", "refine_cut", "compact_chosen"]
    assert all(name in text for name in kernels) and "stablehlo.sort" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_equal_the_reference_on_a_gpu(case):
    call = (case.batch, case.code_heads, case.heads, case.code_bits, case.kv_len, case.limit, False)
    codes, weights, rng = draw_call(3, *call)
    ends = rng.integers(case.budget, case.kv_len, case.batch, endpoint=True).astype(np.int32)
    budgets = rng.integers(1, case.budget, case.batch, endpoint=True).astype(np.int32)
    static = {"max_budget": case.budget, "limit": case.limit}
    found, expected = (
        packing(functools.partial(score_select, impl=impl))(codes, weights, ends, budgets, **static)
        for impl in ("pallas_triton", "reference")
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_shapes_that_do_not_fit_are_refused():
    codes, weights = map(jnp.asarray, draw_call(0, 1, 2, 3, 64, 40, 7, False)[:2])
    one = jnp.ones((1,), jnp.int32)
    with pytest.raises(InputError, match="multiple of code_heads"):
        score_select(codes, pack_weights(weights), one, one, 4, 7)
    with pytest.raises(InputError, match="do not fit int8"):
        score_select(codes, pack_weights(weights[:, :2]), one, one, 4, 128)
    with pytest.raises(InputError, match="do not fit: batch"):
        score_select(codes, weights[:, :2], one, one, 4, 7)


def test_packed_weights_by_hand():
    weights = jnp.arange(-32, 32, dtype=jnp.int32)[None]
    packed = np.asarray(pack_weights(weights))
    assert packed.shape == (1, 16) and packed[0, 3].tobytes() == np.array([-29, -21, -13, -5], np.int8).tobytes()
    assert packed[0, 8].tobytes() == np.array([0, 8, 16, 24], np.int8).tobytes()
    np.testing.assert_array_equal(unpack_weights(jnp.asarray(packed)), weights)
