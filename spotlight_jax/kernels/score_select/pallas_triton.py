"""Scores, the cut and its compaction in a few kernels: codes are read once, ranks are counted where they lie.

Every program owns a chunk of one row (a row is one selecting head of one sequence):

    score     codes -> ranks, and a histogram of the ranks' first digit
    refine    adds up the histograms of all chunks: one digit of the cut; a histogram of the next digit below it
    compact   the last digit; a chunk knows from all histograms where its choice goes, ties to the newest chunks first

Weights are multiplied four at a time: bits of a word taken eight apart are four bytes of 0 or 2^j, which `dp4a`
multiplies with four int8 weights and adds up, exactly. A histogram has 32 bins: a thread counts in fields of four bits,
eight to a number, and the program adds them up at the end. Counts are whole numbers and every choice has one place, so
a run gives the same result bit for bit every time. Needs nothing newer than compute capability 6.1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Int32, UInt32

from spotlight_jax.kernels.score_select.packing import BYTE, WORD_BITS

DIGIT_BITS = 5
BINS = 1 << DIGIT_BITS
FIELD_BITS = 4
FIELDS = 8  # of a number
ABOVE = BINS  # place of the count of ranks above all bins
COUNTS = 64  # places of a chunk: bins, and the ranks above; a power of two

PROGRAMS = 384  # at most, where chunks are long enough: three for each processor of an H100, all at work at once
SCORE_WARPS = 4  # few, each with many codes on their way: what scoring waits for is memory
WARPS = 8  # of the kernels after it
STEP = 1024  # tokens that a program scores together
WIDE_STEP = 2048  # ranks that it counts or compacts together; a chunk is one step or some wide ones
LONGEST_CHUNK = 14 * STEP  # fields of four bits do not overflow


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call."""

    rows: int
    heads: int
    code_heads: int
    words: int
    kv_len: int
    chunk: int
    rank_bits: int
    span: int  # places of a byte whose weights fit one power of two
    sink_tokens: int
    recent_tokens: int
    max_budget: int
    interpret: bool

    @property
    def chunks(self) -> int:
        """Of a row."""
        return -(-self.kv_len // self.chunk)

    @property
    def lanes(self) -> int:
        """Width of vectors over chunks: a power of two."""
        return 1 << (self.chunks - 1).bit_length()

    @property
    def width(self) -> int:
        """Ranks that are counted or compacted together."""
        return min(WIDE_STEP, self.chunk)

    @property
    def always(self) -> int:
        """Rank of tokens that are read whatever their score."""
        return (1 << self.rank_bits) - 1

    @property
    def dtype(self) -> jnp.dtype:
        """What ranks are kept as."""
        return jnp.dtype(jnp.int16 if self.rank_bits <= 15 else jnp.int32)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Of each round's digit; the last one is 0."""
        return tuple(range(DIGIT_BITS * ((self.rank_bits - 1) // DIGIT_BITS), -1, -DIGIT_BITS))


def choose_chunk(rows: int, kv_len: int) -> int:
    """Tokens of a program: few enough that a GPU is full, many enough that all programs run at once."""
    chunk = WIDE_STEP * -(-rows * kv_len // (PROGRAMS * WIDE_STEP))
    return STEP if rows * kv_len <= PROGRAMS * STEP else min(chunk, LONGEST_CHUNK)


def _elementwise(operation: str, *args: Array) -> Int32[Array, "step"]:
    """One PTX instruction for every token."""
    [result] = plgpu.elementwise_inline_asm(
        f"{operation} $0, {', '.join(f'${place}' for place in range(1, len(args) + 1))};",
        args=args,
        constraints=",".join(["=r"] + ["r"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[-1].shape, jnp.int32)],
    )
    return result


def _byte_of(packed: Int32[Array, "*shape"], place: int) -> Int32[Array, "*shape"]:
    """The signed byte that begins at a bit."""
    return (packed << (WORD_BITS - BYTE - place)) >> (WORD_BITS - BYTE)


def _raise_bytes(packed: Int32[Array, ""], power: int) -> Int32[Array, ""]:
    """Each signed byte times 2^power, where that is a signed byte too."""
    kept = ((255 << power) & 255) * 0x01010101 - (1 << WORD_BITS)  # a negative int32
    return (packed << power) & kept


def _dot_bytes(
    bytes_: UInt32[Array, "step"], weights: Int32[Array, ""], total: Int32[Array, "step"], interpret: bool
) -> Int32[Array, "step"]:
    """total + the dot product of four unsigned bytes with four signed ones."""
    if not interpret:
        return _elementwise("dp4a.u32.s32", bytes_, jnp.broadcast_to(weights, bytes_.shape), total)
    for place in range(0, WORD_BITS, BYTE):
        byte = ((bytes_ >> place) & 255).astype(jnp.int32)
        total = total + byte * _byte_of(weights, place)
    return total


def _add_digits(relative: Int32[Array, "step"], shift: int, fields: tuple, interpret: bool) -> tuple:
    """Count the digit at `shift` of every rank relative to the cut's lower end; what lies outside the bins is not."""
    amounts = lax.shift_right_logical(relative, shift) * FIELD_BITS

    def one_at(amounts):  # 0 where an amount is negative or past a number's end
        if interpret:
            return lax.shift_left(jnp.ones_like(amounts), amounts)
        return _elementwise("shl.b32", jnp.ones_like(amounts), amounts)

    return tuple(field + one_at(amounts - WORD_BITS * place) for place, field in enumerate(fields))


def _store_digits(fields: tuple, counts_ref) -> None:
    """Add up over the program's threads, two fields, sixteen bits apart, in one sum; the highest bin goes first."""
    lows = jnp.arange(FIELDS // 2, dtype=jnp.int32)
    for place, field in enumerate(fields):
        both = jnp.sum(lax.shift_right_logical(field[None, :], FIELD_BITS * lows[:, None]) & 0x000F000F, axis=1)
        highest = BINS - 1 - FIELDS * place
        plgpu.store(counts_ref.at[highest - lows], both & 0xFFFF)
        plgpu.store(counts_ref.at[highest - FIELDS // 2 - lows], lax.shift_right_logical(both, 16))


def _no_fields(step: int) -> tuple:
    return tuple(jnp.zeros((step,), jnp.int32) for _ in range(BINS // FIELDS))


def _positions(start, step, width: int) -> Int32[Array, "width"]:
    return start + step * width + jnp.arange(width, dtype=jnp.int32)


def _walk(steps, load, work, start):
    """`work` on each step's `load`, the next one's asked for before: memory is read while there is work."""

    def take_step(step, carry):
        loaded, done = carry
        ahead = load(step + 1)
        return ahead, work(step, loaded, done)

    return lax.fori_loop(0, steps, take_step, (load(0), start))[1]


def _in_filled_chunk(is_filled, counts_ref, count) -> None:
    """Count in a chunk that holds tokens; nothing is counted in others."""

    def clear():
        counts_ref[...] = jnp.zeros((COUNTS,), jnp.int32)

    pl.when(is_filled)(count)
    pl.when(jnp.logical_not(is_filled))(clear)


def _least_score(weights_ref, plan: Plan) -> Int32[Array, ""]:
    """Sum of a row's negative weights."""
    places = jnp.arange(1 << (plan.words * BYTE - 1).bit_length(), dtype=jnp.int32)
    packed = plgpu.load(weights_ref.at[places], mask=places < plan.words * BYTE, other=0)
    total = jnp.zeros(places.shape, jnp.int32)
    for place in range(0, WORD_BITS, BYTE):
        total = total + jnp.minimum(_byte_of(packed, place), 0)
    return jnp.sum(total)


def _score_words(words: list[Array], packed: list[Array], plan: Plan) -> Int32[Array, "step"]:
    """Scores of codes. Places of a byte whose weights can be brought to one power of two are added up together."""
    scores = jnp.zeros(words[0].shape, jnp.int32)
    for first in range(0, BYTE, plan.span):
        last = min(first + plan.span, BYTE) - 1
        total = jnp.zeros(words[0].shape, jnp.int32)
        for place in range(first, last + 1):
            mask = jnp.uint32(0x01010101 << place)
            for word, bits in enumerate(words):
                weights = _raise_bytes(packed[word * BYTE + place], last - place)
                total = _dot_bytes(bits & mask, weights, total, plan.interpret)
        scores = scores + (total >> last)
    return scores


def _score_kernel(bounds_ref, weights_ref, codes_ref, ranks_ref, counts_ref, *, plan: Plan) -> None:
    start, end = pl.program_id(1) * plan.chunk, bounds_ref[0]
    packed = [weights_ref[place] for place in range(plan.words * BYTE)]
    offset = 1 - _least_score(weights_ref, plan)  # the least rank of a visible token is 1

    filled = jnp.minimum(plan.chunk, plan.kv_len - start)

    def load_words(step):
        at, is_there = pl.ds(step * STEP, STEP), _positions(0, step, STEP) < filled
        return [plgpu.load(codes_ref.at[jnp.int32(word), at], mask=is_there, other=0) for word in range(plan.words)]

    def score_step(step, words, fields):
        positions = _positions(start, step, STEP)
        ranks = _score_words(words, packed, plan) + offset

        def force(ranks):
            is_always_read = (positions < plan.sink_tokens) | (positions >= end - plan.recent_tokens)
            return jnp.where(positions < end, jnp.where(is_always_read, plan.always, ranks), 0)

        first = start + step * STEP
        is_plain = (first >= plan.sink_tokens) & (first + STEP <= end - plan.recent_tokens)
        ranks = lax.cond(is_plain, lambda ranks: ranks, force, ranks)
        at, is_there = pl.ds(step * STEP, STEP), positions < plan.kv_len
        plgpu.store(ranks_ref.at[at], ranks.astype(plan.dtype), mask=is_there)
        return _add_digits(ranks, plan.shifts[0], fields, plan.interpret)

    def count():
        _store_digits(_walk(plan.chunk // STEP, load_words, score_step, _no_fields(STEP)), counts_ref)
        counts_ref[ABOVE] = jnp.int32(0)

    _in_filled_chunk(start < end, counts_ref, count)


def _walk_ranks(ranks_ref, chunk, plan: Plan, work, start, steps):
    """`work` on a chunk's ranks, some at a time; 0 behind those that there are."""
    filled = jnp.minimum(plan.chunk, plan.kv_len - chunk * plan.chunk)

    def load_ranks(step):
        at, is_there = pl.ds(step * plan.width, plan.width), _positions(0, step, plan.width) < filled
        return plgpu.load(ranks_ref.at[at], mask=is_there, other=0)

    return _walk(steps, load_ranks, work, start)


def _load_bins(counts_ref, plan: Plan) -> Int32[Array, "bins lanes"]:
    """Histograms of a row's chunks, the highest bin first."""
    chunks, places = jnp.arange(plan.lanes, dtype=jnp.int32), jnp.arange(BINS, dtype=jnp.int32)
    is_there = jnp.broadcast_to((chunks < plan.chunks)[None, :], (BINS, plan.lanes))
    return plgpu.load(counts_ref.at[places[:, None], chunks[None, :]], mask=is_there, other=0)


def _find_bin(bins: Int32[Array, "bins lanes"], wanted: Int32[Array, ""]) -> tuple:
    """Which bin holds the last of `wanted` ranks, and how many ranks lie in those before it."""
    reached = jnp.cumsum(jnp.sum(bins, axis=1))
    places = jnp.arange(1, BINS + 1, dtype=jnp.int32)
    most = jnp.max(jnp.where(reached < wanted, reached * BINS + places, 0))  # of the last bin before: neither falls
    return most & (BINS - 1), lax.shift_right_logical(most, DIGIT_BITS)


def _refine_kernel(bounds_ref, cut_ref, before_ref, ranks_ref, new_cut_ref, counts_ref, *, plan: Plan, done: int):
    chunk = pl.program_id(1)
    found, above = _find_bin(_load_bins(before_ref, plan), bounds_ref[1] - cut_ref[1])
    base = cut_ref[0] + ((BINS - 1 - found) << plan.shifts[done - 1])
    new_cut_ref[0] = base
    new_cut_ref[1] = cut_ref[1] + above
    shift = plan.shifts[done]

    def count_step(_, ranks, fields):
        return _add_digits(ranks.astype(jnp.int32) - base, shift, fields, plan.interpret)

    def count():
        fields = _walk_ranks(ranks_ref, chunk, plan, count_step, _no_fields(plan.width), plan.chunk // plan.width)
        _store_digits(fields, counts_ref)
        places = jnp.arange(BINS, dtype=jnp.int32)
        own = plgpu.load(before_ref.at[places, chunk])
        counts_ref[ABOVE] = before_ref[ABOVE, chunk] + jnp.sum(jnp.where(places < found, own, 0))

    _in_filled_chunk(chunk * plan.chunk < bounds_ref[0], counts_ref, count)


def _compact_kernel(bounds_ref, cut_ref, before_ref, ranks_ref, places_ref, *, plan: Plan) -> None:
    budget = bounds_ref[1]
    bins = _load_bins(before_ref, plan)
    found, above_cut = _find_bin(bins, budget - cut_ref[1])
    cut = cut_ref[0] + BINS - 1 - found
    chunks = jnp.arange(plan.lanes, dtype=jnp.int32)
    rows = jnp.arange(BINS, dtype=jnp.int32)[:, None]
    both = jnp.sum(jnp.where(rows < found, bins, 0) + jnp.where(rows == found, bins << 16, 0), axis=0)
    ties = lax.shift_right_logical(both, 16)  # of each chunk
    above = (both & 0xFFFF) + plgpu.load(before_ref.at[ABOVE, chunks], mask=chunks < plan.chunks, other=0)
    newer_ties = jnp.sum(ties) - jnp.cumsum(ties)
    taken = jnp.clip(budget - cut_ref[1] - above_cut - newer_ties, 0, ties)
    chunk = pl.program_id(1)
    first = jnp.sum(jnp.where(chunks < chunk, above + taken, 0))
    own = jnp.sum(jnp.where(chunks == chunk, ((above + taken) << 16) + ties - taken, 0))
    chosen, dropped = lax.shift_right_logical(own, 16), own & 0xFFFF
    is_tie_dropped = jnp.minimum(dropped, 1)
    is_split = is_tie_dropped * jnp.minimum(jnp.sum(jnp.where(chunks == chunk, taken, 0)), 1)  # at most one of a row

    def count_older(_, ranks, before):
        """Places before the first tie that is chosen, and ties."""
        places, ties = before
        reached = ties + jnp.cumsum(jnp.where(ranks.astype(jnp.int32) == cut, 1, 0))
        return places + jnp.sum(jnp.where(reached <= dropped, 1, 0)), jnp.max(reached)

    steps, none = plan.chunk // plan.width, (jnp.int32(0), jnp.int32(0))
    older, _ = _walk_ranks(ranks_ref, chunk, plan, count_older, none, is_split * steps)
    first_tie = older + (is_tie_dropped - is_split) * plan.chunk  # of those that are chosen

    def compact_step(step, ranks, before):
        places = _positions(0, step, plan.width)
        is_chosen = ranks.astype(jnp.int32) > jnp.where(places >= first_tie, cut - 1, cut)
        filled = before + jnp.cumsum(jnp.where(is_chosen, 1, 0))
        slots = jnp.where(is_chosen, filled - 1, plan.max_budget)
        plgpu.store(places_ref.at[slots], chunk * plan.chunk + places, mask=is_chosen)
        return jnp.max(filled)

    def compact():
        _walk_ranks(ranks_ref, chunk, plan, compact_step, first, steps)

    def clear_step(step, _):
        slots = _positions(0, step, WIDE_STEP)
        is_free = (slots >= budget) & (slots < plan.max_budget)
        plgpu.store(places_ref.at[slots], jnp.zeros_like(slots), mask=is_free)

    def clear():  # slots that a smaller budget leaves
        lax.fori_loop(budget // WIDE_STEP, -(-plan.max_budget // WIDE_STEP), clear_step, None)

    pl.when(chosen > 0)(compact)
    pl.when(chunk == plan.chunks - 1)(clear)


def score_select_pallas_triton(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "batch heads packed"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    max_budget: int,
    limit: int,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    interpret: bool = False,
) -> tuple[Int32[Array, "batch heads max_budget"], Bool[Array, "batch heads max_budget"]]:
    """As the reference."""
    batch, code_heads, words, kv_len = codes.shape
    heads, bound = weights.shape[1], limit * WORD_BITS * words  # a row's scores spread over sum(abs(weights))
    rows = batch * heads
    plan = Plan(
        rows=rows, heads=heads, code_heads=code_heads, words=words, kv_len=kv_len, chunk=choose_chunk(rows, kv_len),
        rank_bits=(bound + 2).bit_length(), span=BYTE - limit.bit_length(), sink_tokens=sink_tokens,
        recent_tokens=recent_tokens, max_budget=max_budget, interpret=interpret,
    )  # fmt: skip
    budgets = jnp.minimum(budgets, ends)
    bounds = jnp.stack([ends, budgets], axis=1)

    def row_and_chunk(*shape):
        return pl.BlockSpec(shape, lambda row, chunk: (row,) + (0,) * (len(shape) - 2) + (chunk,))

    def row_of(*shape):
        return pl.BlockSpec((None, *shape), lambda row, chunk: (row,) + (0,) * len(shape))

    group = heads // code_heads
    codes_of = pl.BlockSpec(
        (None, None, words, plan.chunk), lambda row, chunk: (row // heads, row % heads // group, 0, chunk)
    )
    of_bounds = pl.BlockSpec((None, 2), lambda row, chunk: (row // heads, 0))
    of_ranks, of_counts = row_and_chunk(None, plan.chunk), row_of(COUNTS, plan.chunks)
    own_counts = row_and_chunk(None, COUNTS, None)
    counts_shape = jax.ShapeDtypeStruct((rows, COUNTS, plan.chunks), jnp.int32)
    ranks_shape = jax.ShapeDtypeStruct((rows, kv_len), plan.dtype)
    call = functools.partial(
        pl.pallas_call,
        grid=(rows, plan.chunks),
        interpret=interpret,
    )
    score_params, params = (plgpu.CompilerParams(num_warps=warps, num_stages=1) for warps in (SCORE_WARPS, WARPS))
    ranks, counts = call(
        functools.partial(_score_kernel, plan=plan), name="score_ranks", compiler_params=score_params,
        in_specs=[of_bounds, row_of(weights.shape[2]), codes_of], out_specs=[of_ranks, own_counts],
        out_shape=[ranks_shape, counts_shape],
    )(bounds, weights.reshape(rows, -1), codes)  # fmt: skip
    cut = jnp.zeros((rows, 2), jnp.int32)  # the cut's digits so far, and how many ranks lie above them
    for done in range(1, len(plan.shifts)):
        cut, counts = call(
            functools.partial(_refine_kernel, plan=plan, done=done), name="refine_cut", compiler_params=params,
            in_specs=[of_bounds, row_of(2), of_counts, of_ranks], out_specs=[row_of(2), own_counts],
            out_shape=[jax.ShapeDtypeStruct(cut.shape, jnp.int32), counts_shape],
        )(bounds, cut, counts, ranks)  # fmt: skip
    places = call(
        functools.partial(_compact_kernel, plan=plan), name="compact_chosen", compiler_params=params,
        in_specs=[of_bounds, row_of(2), of_counts, of_ranks], out_specs=row_of(max_budget),
        out_shape=jax.ShapeDtypeStruct((rows, max_budget), jnp.int32),
    )(bounds, cut, counts, ranks)  # fmt: skip
    is_real = jnp.arange(max_budget, dtype=jnp.int32)[None, None, :] < budgets[:, None, None]
    shape = (batch, heads, max_budget)
    return places.reshape(shape), jnp.broadcast_to(is_real, shape)
