"""Every op's contract: `auto` chooses, a named implementation runs or raises, the reference is always one of them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from spotlight_jax.errors import InputError

Result = TypeVar("Result")


def pick_backend(
    op: str,
    backends: Mapping[str, Callable[..., Result]],
    impl: str,
    choose: Callable[[], str],
    axis: str | None = None,
) -> Callable[..., Result]:
    """Return the implementation that was asked for.

    Args:
        op: named in the error.
        backends: all implementations of the op by name; "reference" is among them.
        impl: one of these names, or "auto".
        choose: gives the name that `auto` takes here.
        axis: over which the op's arrays are split (`token_axis`), if any: the reference, which sees whole ones, is none
            of the implementations then.

    Raises: InputError for a name that the op does not have.
    """
    if axis is not None:
        backends = {name: run for name, run in backends.items() if name != "reference"}
    name = choose() if impl == "auto" else impl
    if name not in backends:
        raise InputError(f"{op} has no implementation {name!r}; give auto, {', '.join(backends)}")
    return backends[name]
