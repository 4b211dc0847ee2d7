"""How each op is tested: how close its implementations are to its reference, and what of a case a CPU runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.pair_cost.pallas_triton import pair_sums_pallas_triton
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    estimated_attention_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.kernels.table import OPS, Op


def check_equal(found: Any, expected: Any, case: Any) -> None:
    """Integers and copies have one right result."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def check_attention(found: jax.Array, expected: jax.Array, case: Any) -> None:
    """Products of 16-bit floats, and on a GPU of 32-bit ones, are rounded."""
    is_rounded = case.dtype != "float32" or jax.default_backend() == "gpu"
    bound = {"atol": 5e-3} if jax.default_backend() == "gpu" else {"atol": 2e-2 if is_rounded else 2e-5}
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-5, **bound)


def check_estimates(found: Any, expected: Any, case: Any) -> None:
    """Outputs and shares; the reference knows all logits, the others know moments."""
    for one, other in zip(found, expected, strict=True):
        check_attention(one, other, dataclasses.replace(case, dtype="bfloat16"))


def check_pair_sums(found: Any, expected: Any, case: Any) -> None:
    """A kernel's logarithms and quotients are right to about 1e-7 each."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-4)


def check_hashing(found: Any, expected: Any, case: Any) -> None:
    """A weight may be rounded the other way, a key next to a cell's end lie in the other cell."""
    off = np.abs(np.asarray(found[1], int) - np.asarray(expected[1], int))
    assert off.max() <= 1 and off.mean() < 0.02
    for place in (0, 2, 3):
        np.testing.assert_array_equal(found[place], expected[place])
    written = case.batch * case.kv_heads * case.code_bits
    assert jax.lax.population_count(found[4] ^ expected[4]).sum() <= max(2, 0.005 * written)


@dataclasses.dataclass(frozen=True)
class Tested:
    """One op and how its tests run it."""

    op: Op
    smaller: dict[str, int]  # the most of a case's field where a CPU runs it
    check: Callable[[Any, Any, Any], None] = check_equal
    interpreted: Callable[..., Any] | None = None  # its kernel on the interpreter
    kernels: tuple[str, ...] = ()  # that the lowered program launches

    def call(self, impl: str, case: Any) -> Any:
        """What an implementation gives for a case's random arrays ("interpreted": its kernel on the interpreter)."""
        arrays, static = case.draw()
        run = self.interpreted if impl == "interpreted" else functools.partial(self.op.run, impl=impl)
        assert run is not None
        return jax.jit(functools.partial(run, **static))(*arrays)

    def shrink(self, case: Any) -> Any:
        """The case with fewer tokens and sequences."""
        fields = {name: min(getattr(case, name), most) for name, most in self.smaller.items()}
        return dataclasses.replace(case, **fields)


TESTED = {
    "match_score": Tested(OPS["match_score"], {"kv_len": 700}),
    "select_top": Tested(OPS["select_top"], {"kv_len": 8192, "heads": 4, "budget": 700}),
    "score_select": Tested(
        OPS["score_select"], {"kv_len": 3000, "batch": 2, "budget": 200},
        interpreted=functools.partial(score_select_pallas_triton, interpret=True),
        kernels=("score_ranks", "compact_chosen"),
    ),
    "sparse_attention": Tested(
        OPS["sparse_attention"], {"kv_len": 600, "batch": 2, "budget": 150}, check_attention,
        functools.partial(sparse_attention_pallas_triton, interpret=True), ("read_chosen", "join_reads"),
    ),
    "estimated_attention": Tested(
        OPS["estimated_attention"], {"kv_len": 600, "batch": 2, "budget": 150}, check_estimates,
        functools.partial(estimated_attention_pallas_triton, interpret=True), ("read_chosen", "join_reads"),
    ),
    "hash_append": Tested(
        OPS["hash_append"], {"batch": 9, "max_len": 40}, check_hashing,
        functools.partial(hash_append_pallas_triton, interpret=True), ("hash_append",),
    ),
    "pair_cost": Tested(
        OPS["pair_cost"], {"queries": 3}, check_pair_sums,
        functools.partial(pair_sums_pallas_triton, interpret=True), ("pair_sums",),
    ),
}  # fmt: skip
