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

WORD_BITS = 32
BYTE = 8
DIGIT_BITS = 5
BINS = 1 << DIGIT_BITS
FIELD_BITS = 4
FIELDS = 8  # of a number
ABOVE = BINS  # place of the count of ranks above all bins, of the last round
COUNTS = 64  # places of a chunk: bins, and the ranks above; a power of two

PROGRAMS = 256  # at least, where there is work for so many: about two for each processor of a GPU
WARPS = 8
STEP = 1024  # tokens that a program scores together
WIDE_STEP = 2048  # ranks that it counts or compacts together
SHORTEST_CHUNK, LONGEST_CHUNK = 512, 8192  # at most 15 steps: fields of four bits do not overflow


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
    """Tokens of a program: few enough that a GPU is full, many enough that histograms are small beside ranks."""
    wanted = 1 << max(rows * kv_len // PROGRAMS, 1).bit_length() - 1
    return min(max(wanted, SHORTEST_CHUNK), LONGEST_CHUNK)


def _dot_bytes(
    bytes_: UInt32[Array, "step"], weights: Int32[Array, ""], total: Int32[Array, "step"], interpret: bool
) -> Int32[Array, "step"]:
    """total + the dot product of four unsigned bytes with four signed ones."""
    if interpret:
        for place in range(0, WORD_BITS, BYTE):
            byte = ((bytes_ >> place) & 255).astype(jnp.int32)
            total = total + byte * ((weights << (WORD_BITS - BYTE - place)) >> (WORD_BITS - BYTE))
        return total
    [total] = plgpu.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        args=[bytes_, jnp.broadcast_to(weights, bytes_.shape), total],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
    )
    return total


def _add_digits(relative: Int32[Array, "step"], shift: int, fields: tuple) -> tuple:
    """Count the digit at `shift` of every rank relative to the cut's lower end; what lies outside the bins is not."""
    digits = lax.shift_right_logical(relative, shift)
    one = jnp.int32(1) << ((digits & (FIELDS - 1)) * FIELD_BITS)
    number = lax.shift_right_logical(digits, 3)
    return tuple(field + jnp.where(number == place, one, 0) for place, field in enumerate(fields))


def _store_digits(fields: tuple, counts_ref) -> None:
    """Add up over the program's threads: two fields, sixteen bits apart, in one sum."""
    for place, field in enumerate(fields):
        for low in range(FIELDS // 2):
            both = jnp.sum(lax.shift_right_logical(field, FIELD_BITS * low) & 0x000F000F)
            counts_ref[FIELDS * place + low] = both & 0xFFFF
            counts_ref[FIELDS * place + low + FIELDS // 2] = lax.shift_right_logical(both, 16)


def _no_fields(step: int) -> tuple:
    return tuple(jnp.zeros((step,), jnp.int32) for _ in range(BINS // FIELDS))


def _positions(start, step, width: int) -> Int32[Array, "width"]:
    return start + step * width + jnp.arange(width, dtype=jnp.int32)


def _in_filled_chunk(is_filled, counts_ref, count) -> None:
    """Count in a chunk that holds tokens; nothing is counted in others."""

    def clear():
        counts_ref[...] = jnp.zeros((COUNTS,), jnp.int32)

    pl.when(is_filled)(count)
    pl.when(jnp.logical_not(is_filled))(clear)


def _least_score(meta_ref, plan: Plan) -> Int32[Array, ""]:
    """Sum of a row's negative weights."""
    places = jnp.arange(1 << (plan.words * BYTE - 1).bit_length(), dtype=jnp.int32)
    packed = plgpu.load(meta_ref.at[2 + places], mask=places < plan.words * BYTE, other=0)
    total = jnp.zeros(places.shape, jnp.int32)
    for place in range(0, WORD_BITS, BYTE):
        total = total + jnp.minimum((packed << (WORD_BITS - BYTE - place)) >> (WORD_BITS - BYTE), 0)
    return jnp.sum(total)


def _score_kernel(meta_ref, codes_ref, ranks_ref, counts_ref, *, plan: Plan) -> None:
    start, end = pl.program_id(1) * plan.chunk, meta_ref[0]
    width = min(STEP, plan.chunk)
    packed = [meta_ref[2 + place] for place in range(plan.words * BYTE)]
    offset = 1 - _least_score(meta_ref, plan)  # the least rank of a visible token is 1

    def score_step(step, fields):
        positions = _positions(start, step, width)
        at = pl.ds(step * width, width)
        is_there = positions < plan.kv_len
        words = [plgpu.load(codes_ref.at[jnp.int32(word), at], mask=is_there, other=0) for word in range(plan.words)]
        scores = jnp.zeros((width,), jnp.int32)
        for place in range(BYTE):
            total = jnp.zeros((width,), jnp.int32)
            mask = jnp.uint32(0x01010101 << place)
            for word, bits in enumerate(words):
                total = _dot_bytes(bits & mask, packed[word * BYTE + place], total, plan.interpret)
            scores = scores + (total >> place)
        is_always_read = (positions < plan.sink_tokens) | (positions >= end - plan.recent_tokens)
        ranks = jnp.where(is_always_read, plan.always, scores + offset)
        ranks = jnp.where(positions < end, ranks, 0)
        plgpu.store(ranks_ref.at[at], ranks.astype(plan.dtype), mask=is_there)
        return _add_digits(ranks, plan.shifts[0], fields)

    def count():
        _store_digits(lax.fori_loop(0, plan.chunk // width, score_step, _no_fields(width)), counts_ref)

    _in_filled_chunk(start < end, counts_ref, count)


def _load_counts(counts_ref, plan: Plan) -> Int32[Array, "counts lanes"]:
    """Histograms of a row's chunks."""
    chunks = jnp.arange(plan.lanes, dtype=jnp.int32)
    places = jnp.arange(COUNTS, dtype=jnp.int32)
    is_there = (places <= ABOVE)[:, None] & (chunks < plan.chunks)[None, :]
    return plgpu.load(counts_ref.at[places[:, None], chunks[None, :]], mask=is_there, other=0)


def _find_digit(counts: Int32[Array, "counts lanes"], wanted: Int32[Array, ""]) -> tuple:
    """The greatest digit that `wanted` ranks of the row's bins reach, and how many lie above it."""
    totals = jnp.sum(counts, axis=1)
    places = jnp.arange(COUNTS, dtype=jnp.int32)
    totals = jnp.where(places < BINS, totals, 0)
    reached = jnp.sum(totals) - jnp.cumsum(totals) + totals
    digit = jnp.sum(jnp.where((reached >= wanted) & (places < BINS), 1, 0)) - 1
    return digit, jnp.sum(jnp.where(places > digit, totals, 0))


def _refine_kernel(meta_ref, cut_ref, before_ref, ranks_ref, new_cut_ref, counts_ref, *, plan: Plan, done: int):
    start, end = pl.program_id(1) * plan.chunk, meta_ref[0]
    digit, above = _find_digit(_load_counts(before_ref, plan), meta_ref[1] - cut_ref[1])
    base = cut_ref[0] + (digit << plan.shifts[done - 1])
    new_cut_ref[0] = base
    new_cut_ref[1] = cut_ref[1] + above
    width, shift = min(WIDE_STEP, plan.chunk), plan.shifts[done]

    def count_step(step, carry):
        fields, above = carry
        at = pl.ds(step * width, width)
        ranks = plgpu.load(ranks_ref.at[at], mask=_positions(start, step, width) < plan.kv_len, other=0)
        relative = ranks.astype(jnp.int32) - base
        return _add_digits(relative, shift, fields), above + jnp.where(relative >= BINS, 1, 0)

    def count():
        zero = _no_fields(width), jnp.zeros((width,), jnp.int32)
        fields, above = lax.fori_loop(0, plan.chunk // width, count_step, zero)
        _store_digits(fields, counts_ref)
        if shift == 0:
            counts_ref[ABOVE] = jnp.sum(above)

    _in_filled_chunk(start < end, counts_ref, count)


def _compact_kernel(meta_ref, cut_ref, before_ref, ranks_ref, places_ref, *, plan: Plan) -> None:
    budget = meta_ref[1]
    counts = _load_counts(before_ref, plan)
    digit, _ = _find_digit(counts, budget - cut_ref[1])
    cut = cut_ref[0] + digit
    rows = jnp.arange(COUNTS, dtype=jnp.int32)[:, None]
    ties = jnp.sum(jnp.where(rows == digit, counts, 0), axis=0)
    above = jnp.sum(jnp.where(rows > digit, counts, 0), axis=0)
    newer_ties = jnp.sum(ties) - jnp.cumsum(ties)
    taken = jnp.clip(budget - jnp.sum(above) - newer_ties, 0, ties)
    chunk = pl.program_id(1)
    start = chunk * plan.chunk
    chunks = jnp.arange(plan.lanes, dtype=jnp.int32)
    first = jnp.sum(jnp.where(chunks < chunk, above + taken, 0))
    dropped = jnp.sum(jnp.where(chunks == chunk, ties - taken, 0))
    chosen = jnp.sum(jnp.where(chunks == chunk, above + taken, 0))
    width = min(WIDE_STEP, plan.chunk)

    def compact_step(step, carry):
        above_before, ties_before = carry
        at = pl.ds(step * width, width)
        positions = _positions(start, step, width)
        ranks = plgpu.load(ranks_ref.at[at], mask=positions < plan.kv_len, other=0).astype(jnp.int32)
        both = jnp.cumsum(jnp.where(ranks > cut, 1, 0) + jnp.where(ranks == cut, 1 << 16, 0))
        above = above_before + (both & 0xFFFF)
        ties = ties_before + lax.shift_right_logical(both, 16)
        is_chosen = (ranks > cut) | ((ranks == cut) & (ties > dropped))
        slots = jnp.where(is_chosen, first + above + jnp.maximum(ties - dropped, 0) - 1, plan.max_budget)
        plgpu.store(places_ref.at[slots], positions, mask=is_chosen)
        return jnp.max(above), jnp.max(ties)

    def compact():
        lax.fori_loop(0, plan.chunk // width, compact_step, (jnp.int32(0), jnp.int32(0)))

    def clear_step(step, _):
        slots = step * width + jnp.arange(width, dtype=jnp.int32)
        is_free = (slots >= budget) & (slots < plan.max_budget)
        plgpu.store(places_ref.at[slots], jnp.zeros_like(slots), mask=is_free)

    def clear():  # slots that a smaller budget leaves
        lax.fori_loop(budget // width, -(-plan.max_budget // width), clear_step, None)

    pl.when(chosen > 0)(compact)
    pl.when(chunk == plan.chunks - 1)(clear)


def _pack_weights(weights: Int32[Array, "batch heads code_bits"]) -> Int32[Array, "rows packed"]:
    """Four int8 weights to a number: those of bits j, j + 8, j + 16 and j + 24 of a word go to its number j."""
    rows = weights.shape[0] * weights.shape[1]
    bytes_ = (weights & 255).reshape(rows, -1, WORD_BITS // BYTE, BYTE)
    packed = bytes_[:, :, 0]
    for place in range(1, WORD_BITS // BYTE):
        packed = packed | (bytes_[:, :, place] << (BYTE * place))
    return packed.reshape(rows, -1)


def score_select_pallas_triton(
    codes: UInt32[Array, "batch code_heads words kv_len"],
    weights: Int32[Array, "batch heads code_bits"],
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
        rank_bits=(bound + 2).bit_length(), sink_tokens=sink_tokens, recent_tokens=recent_tokens, max_budget=max_budget,
        interpret=interpret,
    )  # fmt: skip
    budgets = jnp.minimum(budgets, ends)
    scalars = jnp.stack([jnp.repeat(ends, heads), jnp.repeat(budgets, heads)], axis=1)
    meta = jnp.concatenate([scalars, _pack_weights(weights)], axis=1)

    def row_and_chunk(*shape):
        return pl.BlockSpec(shape, lambda row, chunk: (row,) + (0,) * (len(shape) - 2) + (chunk,))

    def row_of(*shape):
        return pl.BlockSpec((None, *shape), lambda row, chunk: (row,) + (0,) * len(shape))

    group = heads // code_heads
    codes_of = pl.BlockSpec(
        (None, None, words, plan.chunk), lambda row, chunk: (row // heads, row % heads // group, 0, chunk)
    )
    of_meta, of_ranks, of_counts = row_of(meta.shape[1]), row_and_chunk(None, plan.chunk), row_of(COUNTS, plan.chunks)
    own_counts = row_and_chunk(None, COUNTS, None)
    counts_shape = jax.ShapeDtypeStruct((rows, COUNTS, plan.chunks), jnp.int32)
    ranks_shape = jax.ShapeDtypeStruct((rows, kv_len), plan.dtype)
    call = functools.partial(
        pl.pallas_call,
        grid=(rows, plan.chunks),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )
    ranks, counts = call(
        functools.partial(_score_kernel, plan=plan), name="score_ranks",
        in_specs=[of_meta, codes_of], out_specs=[of_ranks, own_counts], out_shape=[ranks_shape, counts_shape],
    )(meta, codes)  # fmt: skip
    cut = jnp.zeros((rows, 2), jnp.int32)  # the cut's digits so far, and how many ranks lie above them
    for done in range(1, len(plan.shifts)):
        cut, counts = call(
            functools.partial(_refine_kernel, plan=plan, done=done), name="refine_cut",
            in_specs=[of_meta, row_of(2), of_counts, of_ranks], out_specs=[row_of(2), own_counts],
            out_shape=[jax.ShapeDtypeStruct(cut.shape, jnp.int32), counts_shape],
        )(meta, cut, counts, ranks)  # fmt: skip
    places = call(
        functools.partial(_compact_kernel, plan=plan), name="compact_chosen",
        in_specs=[of_meta, row_of(2), of_counts, of_ranks], out_specs=row_of(max_budget),
        out_shape=jax.ShapeDtypeStruct((rows, max_budget), jnp.int32),
    )(meta, cut, counts, ranks)  # fmt: skip
    is_real = jnp.arange(max_budget, dtype=jnp.int32)[None, None, :] < budgets[:, None, None]
    shape = (batch, heads, max_budget)
    return places.reshape(shape), jnp.broadcast_to(is_real, shape)
