"""What `eval.speed --parts kernels` times: every op of `spotlight_jax/kernels`, by implementation, at real shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from eval.speed.timing import Op, time_ops
from spotlight_jax.kernels.table import OPS


def case_names(op: str) -> list[str]:
    """Return the cases of an op, in their order."""
    return [case.name for case in OPS[op].cases]


def _nudge(bit: Int32[Array, ""], array: Array) -> Array:
    """Return an array that waits for a bit of the output before, and holds almost the same."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array + (bit * 1e-6).astype(array.dtype)
    return array ^ bit.astype(array.dtype)


def _op_of(name: str, impl: str, static: dict[str, Any]) -> Op:
    """Make an implementation an operation; its runs wait for each other, and write caches in place."""
    run = functools.partial(OPS[name].run, impl=impl, **static)

    def operation(bit: Int32[Array, ""], _: Any, held: Any) -> tuple[Any, Any]:
        found = run(_nudge(bit, held[0]), *held[1:])
        if name == "hash_append":  # the caches are the last arrays but the lengths, and the last results
            return found[:2], (*held[:4], *found[2:], held[-1])
        return jax.tree.leaves(found), held

    return operation


def _nothing(bit: Int32[Array, ""], _: Any, held: Any) -> tuple[Any, Any]:
    """Do what every operation does around its work."""
    return _nudge(bit, held[0]), held


def time_case(op: str, name: str, rounds: int, note: Callable[[str], None]) -> dict[str, list[float]]:
    """Time a case by implementation and round: those that are no mere reference, or the reference alone.

    Args:
        op: a name of `OPS`.
        name: of one of its cases.
        rounds: calls of each implementation, in turn.
        note: is called with what is about to be compiled.
    """
    case = next(case for case in OPS[op].cases if case.name == name)
    arrays, static = case.draw()
    ops = {impl: _op_of(op, impl, static) for impl in OPS[op].implementations(case)}
    return time_ops(ops, _nothing, (tuple(arrays),), None, rounds, note)


def bytes_of_case(op: str, name: str) -> int:
    """Return the bytes of the arrays that a case is given."""
    case = next(case for case in OPS[op].cases if case.name == name)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(lambda: jax.tree.leaves(case.draw()[0])))
