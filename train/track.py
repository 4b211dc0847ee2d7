"""Optional trackers, in addition to the run folder's own metrics."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

from spotlight_jax.errors import InputError

Log = Callable[[int, dict[str, float]], None]

_PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio"}


def check_tracker(name: str) -> None:
    """Raise InputError where the tracker's package is not installed."""
    if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise InputError(f"--track {name} needs its package: pip install 'spotlight-jax[track]'")


def open_tracker(name: str, folder: pathlib.Path, config: dict[str, Any]) -> Log:
    """Return a function that logs scalars of a step to the tracker, or to none."""
    if name == "tensorboard":
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return log
    if name == "trackio":
        import trackio

        trackio.init(project="spotlight-jax", name=folder.name, config=config)
        return lambda step, values: trackio.log(values, step=step)
    return lambda step, values: None
