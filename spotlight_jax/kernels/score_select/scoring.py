"""Ranks of codes: scores by tensor cores that count bits, with always-read tokens on top and unfilled slots at 0.

A binary matrix product ANDs 16 rows of 256 bits with 8 columns and counts. A thread holds 64 bits of two of the rows,
of as many columns as it gets counts of: where a column has weights for the bits of one thread alone, and zeros for
all others, a thread gets the counts of its own two rows by two columns, which are the planes of two sums. So every
thread scores its own tokens, from where it has loaded them.

PTX ISA 9.2, section 9.7.14.5, "Matrix Fragments for mma.m16n8k128" and "mma.m16n8k256", .b1 (bit i of a register is
column or row 32 t + i; k256 alone has the registers in brackets, 128 further on):

    lane l: g = l >> 2, t = l & 3     row                        column
    rows a0, a1 [a2, a3]              g, g + 8 [g, g + 8]        32 t + i [128 + 32 t + i]
    columns b0 [b1]                   32 t + i [128 + 32 t + i]  g
    counts c0, c1, c2, c3             g, g, g + 8, g + 8         2 t, 2 t + 1, 2 t, 2 t + 1

A lane gives its first token's words as a0 [a2], its second's as a1 [a3], so that rows g of four lanes are four tokens
with 32 [64] bits each. Columns 2 t and 2 t + 1, whose counts lane l gets, must hold weights where t is its own alone:
so column g holds weights, of sum g & 1, in lanes where g >> 1 == t (`owned_sums`), and zeros elsewhere.

On the interpreter (`plan.interpret`) `_count_planes` takes the place of `_score_program` and `_own_columns`, and
`pack_bits` that of `_plane_program` and `_ADD_PROGRAM`, so that no test on a CPU runs this PTX: one checks `owned_sums`
by the table above, all is lowered, and run where there is a GPU, by `trust.is_trusted` and the tests marked `gpu`.
"""

import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32

from spotlight_jax.bits import pack_bits
from spotlight_jax.config.hashing import WORD_BITS
from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.score_select.plan import Bounds, Plan, number_operands, positions_of, run_instruction
from spotlight_jax.kernels.triton import Ref

TOKENS = 2  # of a thread, that one product counts
SUMS = 2  # of weights, by which it counts


def _score_program(words: int, planes: int) -> str:
    """Return PTX for two tokens of each thread: the higher of two sums, each with its offset.

    Operands, a register for each of the two tokens: the score; words of the code; planes of the weights from the
    highest down, word by word; the offsets. From the highest plane down, what is counted so far is doubled; the
    highest counts negative.
    """
    scores, *rest = number_operands(1 + words + planes * words + SUMS, TOKENS)
    code, weights, offsets = rest[:words], rest[words:-SUMS], rest[-SUMS:]
    counts = "{c0, c1, c2, c3}"
    lines = [".reg .s32 c<4>;", *(f"mov.s32 c{count}, 0;" for count in range(4))]
    for plane in range(planes):
        if plane:
            lines += [f"mul.lo.s32 c{count}, c{count}, {-2 if plane == 1 else 2};" for count in range(4)]
        for first in range(0, words, 2):
            pair = range(first, min(first + 2, words))
            rows = ", ".join(code[word][token] for word in pair for token in range(TOKENS))
            columns = ", ".join(weights[plane * words + word][0] for word in pair)
            product = f"mma.sync.aligned.m16n8k{128 * len(pair)}.row.col.s32.b1.b1.s32.and.popc"
            lines.append(f"{product} {counts}, {{{rows}}}, {{{columns}}}, {counts};")
    for token, score in enumerate(scores):
        both = [f"c{SUMS * token + one}" for one in range(SUMS)]
        lines += [f"add.s32 {count}, {count}, {offset[token]};" for count, offset in zip(both, offsets, strict=True)]
        lines.append(f"max.s32 {score}, {', '.join(both)};")
    return "{ " + " ".join(lines) + " }"


def _count_planes(words: list[Array], weights: list[list[Array]], offset: Array) -> Array:
    """Return a sum of a code's weights, and its offset; planes from the highest down."""
    total = jnp.zeros(words[0].shape, jnp.int32)
    for plane, of_words in enumerate(weights):
        total = total * (-2 if plane == 1 else 2)
        for word, bits in zip(words, of_words, strict=True):
            total = total + lax.population_count(word & bits.astype(jnp.uint32)).astype(jnp.int32)
    return total + offset


def _lane() -> Int32[Array, "1"]:
    """Return this thread's number in its warp.

    Every thread has its own copy of an array of one number, which may be another number than its neighbours'.
    """
    return run_instruction("mov.u32 $0, %laneid;", jnp.zeros((1,), jnp.int32))


def _plane_program(place: int) -> str:
    """Return PTX for bit `place` of the numbers of a warp's threads, as one word that all of them get."""
    test = f"and.b32 bit, $1, {1 << place}; setp.ne.b32 is_set, bit, 0;"
    return f"{{ .reg .b32 bit; .reg .pred is_set; {test} vote.sync.ballot.b32 $0, is_set, 0xffffffff; }}"


_ADD_PROGRAM = "redux.sync.add.s32 $0, $1, 0xffffffff;"  # of the numbers of a warp's threads


def _weights_of(weights_ref: Ref, one: int, plan: Plan) -> tuple[list[list[Array]], Array]:
    """Return a sum's weights in planes of bits, packed like codes, from the highest plane down; half of their sum.

    A thread loads the weight of its bit of every word.
    """
    first, places = one * plan.words * WORD_BITS, list(reversed(range(plan.planes)))
    if plan.interpret:
        weights = weights_ref[pl.ds(first, plan.words * WORD_BITS)].astype(jnp.int32)
        planes = [list(pack_bits((weights >> place) & 1)[:, None]) for place in places]
        return planes, jnp.sum(weights, keepdims=True) >> 1
    at = first + _lane()
    own = [plgpu.load(weights_ref.at[at + word * WORD_BITS]).astype(jnp.int32) for word in range(plan.words)]
    total = run_instruction(_ADD_PROGRAM, functools.reduce(jnp.add, own))
    return [[run_instruction(_plane_program(place), of_word) for of_word in own] for place in places], total >> 1


def owned_sums(lane: Int32[Array, "lanes"]) -> Iterator[Bool[Array, "lanes"]]:
    """Whether a lane's column has weights of the first sum, and of the second: see the table."""
    is_own = (lane >> 3) == (lane & 3)
    return (is_own & (((lane >> 2) & 1) == one) for one in range(SUMS))


def _own_columns(weights: list[list[Array]], others: list[list[Array]]) -> list[Int32[Array, "1"]]:
    """Return this thread's part of a product's columns: planes of a sum where it meets its own rows, else zeros."""
    first, second = (jnp.where(is_owned, -1, 0) for is_owned in owned_sums(_lane()))
    return [
        (one & first) | (other & second)
        for of_words in zip(weights, others, strict=True)
        for one, other in zip(*of_words, strict=True)
    ]


def ranker_of(weights_ref: Ref, bounds: Bounds, width: int, plan: Plan) -> Callable[[list[Array], Array], Array]:
    """Return a row's function from a step's codes, and the position where the step starts, to ranks."""
    sums, halves = zip(*(_weights_of(weights_ref, one, plan) for one in range(plan.sums)), strict=True)
    offsets = [1 - plan.least - half for half in halves]
    pairs = [(first, min(first + 1, plan.sums - 1)) for first in range(0, plan.sums, SUMS)]
    columns = [] if plan.interpret else [_own_columns(*(sums[one] for one in pair)) for pair in pairs]

    def score_pair(words: list[Array], index: int) -> Array:
        args = [*columns[index], *(offsets[one] for one in pairs[index])]
        args = [lax.bitcast_convert_type(word, jnp.int32) for word in words] + [
            jnp.broadcast_to(arg, (width,)) for arg in args
        ]
        return run_instruction(_score_program(plan.words, plan.planes), *args, pack=TOKENS)

    def rank(words: list[Array], first: Int32[Array, ""]) -> Int32[Array, "width"]:
        if plan.interpret:
            scores = [_count_planes(words, planes, offset) for planes, offset in zip(sums, offsets, strict=True)]
        else:
            scores = [score_pair(words, index) for index in range(len(pairs))]
        ranks = functools.reduce(jnp.maximum, scores)

        def force(ranks: Array) -> Array:
            positions = positions_of(first, 0, width)
            is_always_read = (positions < bounds.sinks) | (positions >= bounds.recent)
            return jnp.where(positions < bounds.end, jnp.where(is_always_read, plan.always, ranks), 0)

        is_plain = (first >= bounds.sinks) & (first + width <= bounds.recent)
        return lax.cond(is_plain, lambda ranks: ranks, force, ranks)

    return rank
