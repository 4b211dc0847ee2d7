"""Kernels are tried on the device before they are used: one that fails there, or errs, is not."""

import concurrent.futures
import functools
import warnings
from collections.abc import Callable

import jax


@functools.cache
def is_trusted(op: str, check: Callable[[], bool]) -> bool:
    """Whether this process's GPU runs an op's kernel and gives what the reference gives; tried once.

    Args:
        op: named in the warning where it does not.
        check: runs kernel and reference on a small random case, and compares them.
    """
    if jax.default_backend() != "gpu":
        return False
    try:
        # A thread knows nothing of the program that is perhaps being traced here, and runs at once. (Inside
        # `jax.ensure_compile_time_eval` a kernel's own constants would be evaluated too, and kernels hold none.)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            if thread.submit(check).result():
                return True
        reason = "gives other results than its reference here"
    except Exception as error:  # whatever a compiler or driver says
        reason = f"does not run here ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    warnings.warn(f"the kernel of {op} {reason}; XLA takes its place", RuntimeWarning, stacklevel=2)
    return False
