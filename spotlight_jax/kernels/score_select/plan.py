"""What the fused kernels share: what is static of a call, the walk over tokens, single instructions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32, PyTree

from spotlight_jax.kernels import triton as plgpu
from spotlight_jax.kernels.score_select.config import Config
from spotlight_jax.kernels.triton import Index, Ref

LEAST_BITS, MOST_BITS = 10, 12  # of ranks that a program counts: a histogram fills its threads, and fits its memory
PARTS = 32  # of a histogram, added up: a cut is looked for among these first


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes and settings of a call."""

    batch: int
    heads: int
    code_heads: int
    words: int
    kv_len: int
    sums: int  # of weights, for each row
    least: int  # score
    rank_bits: int
    planes: int  # of bits that weights have, with their sign
    max_budget: int
    interpret: bool
    cfg: Config

    @property
    def rows(self) -> int:
        """Selecting heads of all sequences."""
        return self.batch * self.heads

    @property
    def always(self) -> int:
        """Rank of tokens that are read whatever their score."""
        return (1 << self.rank_bits) - 1

    @property
    def rank_len(self) -> int:
        """Ranks of a row: whole words."""
        return self.kv_len + self.kv_len % 2

    @property
    def bins(self) -> int:
        """Of a histogram: one for every rank."""
        return 1 << max(self.rank_bits, LEAST_BITS)

    @property
    def bins_of_part(self) -> int:
        """Of a histogram's part."""
        return self.bins // PARTS


class Bounds(NamedTuple):
    """Where a row's tokens begin and end, in this device's slots, and how many it reads of them."""

    sinks: Int32[Array, "*row"]  # from here on, tokens are not always read,
    recent: Int32[Array, "*row"]  # from here on, they are again,
    end: Int32[Array, "*row"]  # and from here on, there are none
    budget: Int32[Array, "*row"]


def read_bounds(bounds_ref: Ref) -> Bounds:
    """Return those of a program's row."""
    return Bounds(*(bounds_ref[place] for place in range(len(Bounds._fields))))


def positions_of(start: Index, step: Index, width: int) -> Int32[Array, "width"]:
    """Return the positions of a step's tokens, from a start on."""
    return start + step * width + jnp.arange(width, dtype=jnp.int32)


def slots_of(step: Index, width: int, there: Int32[Array, ""]) -> tuple[Any, Bool[Array, "width"]]:
    """Return a step's slots in a program's chunk, and whether they are among the `there` that the cache has of it.

    None lie past the chunk: what is asked for ahead of its last step is not read.
    """
    return pl.ds(step * width, width), positions_of(0, step, width) < there


def walk(
    steps: int,
    load: Callable[[Index], PyTree],
    work: Callable[[Index, PyTree, PyTree], PyTree],
    start: PyTree,
) -> PyTree:
    """Run `work` on each step's `load`, the next one asked for before it: memory is read while there is work."""

    def take_step(step: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        loaded, done = carry
        ahead = load(step + 1)
        return ahead, work(step, loaded, done)

    return lax.fori_loop(0, steps, take_step, (load(0), start))[1]


def clear_free_slots(places_ref: Ref, budget: Array, plan: Plan, width: int) -> None:
    """Write zeros where a budget is smaller than the greatest."""

    def clear_step(step: Array, _: None) -> None:
        slots = positions_of(0, step, width)
        is_free = (slots >= budget) & (slots < plan.max_budget)
        plgpu.store(places_ref.at[slots], jnp.zeros_like(slots), mask=is_free)

    lax.fori_loop(budget // width, -(-plan.max_budget // width), clear_step, None)


def number_operands(count: int, pack: int = 1) -> list[list[str]]:
    """Name `count` operands in a program of `run_instruction`, results first: each is `pack` registers in a row."""
    return [[f"${pack * place + token}" for token in range(pack)] for place in range(count)]


def run_instruction(program: str, *args: Array, pack: int = 1) -> Int32[Array, "*shape"]:
    """Run PTX for every token, or `pack` tokens of a thread at a time: its results are the first operands."""
    [result] = plgpu.elementwise_inline_asm(
        program,
        args=args,
        constraints=",".join(["=&r"] * pack + ["r"] * (pack * len(args))),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[-1].shape, jnp.int32)],
    )
    return result
