"""Optional trackers, beside the run folder's own metrics."""

import pathlib
from collections.abc import Callable
from typing import Any

from spotlight_jax.errors import InputError

Log = Callable[[int, dict[str, float]], None]


def open_tracker(name: str, folder: pathlib.Path, config: dict[str, Any]) -> Log:
    """A function that logs scalars of a step; raises InputError where the tracker is not installed."""
    try:
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
    except ImportError:
        raise InputError(f"--track {name} needs its package: pip install 'spotlight-jax[track]'") from None
    return lambda step, values: None
