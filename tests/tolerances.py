"""How close floating-point results of each dtype must be to a reference; integers are compared exactly."""

from typing import NamedTuple

import jax.numpy as jnp


class Tolerance(NamedTuple):
    """Arguments of `np.testing.assert_allclose`."""

    rtol: float
    atol: float


_TOLERANCES = {
    "float64": Tolerance(1e-10, 1e-10),
    "float32": Tolerance(1e-5, 1e-5),
    "float16": Tolerance(2e-3, 2e-3),
    "bfloat16": Tolerance(2e-2, 2e-2),
}


def tolerance(dtype) -> dict[str, float]:
    """Keyword arguments for `np.testing.assert_allclose` between results of that dtype."""
    return _TOLERANCES[jnp.dtype(dtype).name]._asdict()
