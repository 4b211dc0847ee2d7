"""Several processes that train as one: how they find each other, and what only one of them does.

Every process runs the same program on the same text, so all of them make the same calls in the same order. Arrays of a
step are spread over the devices of all; what is written, the first process writes, into a folder that all can read.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from spotlight_jax.errors import InputError, first_line
from train.config import DistributedConfig, LayerwiseConfig

# what a launcher tells each of its processes: its name for JAX, and the variable that says how many there are
_LAUNCHERS = {"slurm": "SLURM_STEP_NUM_TASKS", "ompi": "OMPI_COMM_WORLD_SIZE"}


def launcher(environment: Mapping[str, str]) -> str | None:
    """Return which launcher started this process along with others, None where it is alone."""
    for name, variable in _LAUNCHERS.items():
        count = environment.get(variable, "1")
        if count.isdecimal() and int(count) > 1:
            return name
    return None


def join(cfg: LayerwiseConfig) -> LayerwiseConfig:
    """Join the other processes of the run, if it has any: before JAX looks for devices.

    Returns: the config without what is of this process alone.

    Raises: InputError where they are not all there, or where the run has no folder that they share.
    """
    own, name = cfg.distributed, launcher(os.environ)
    cfg = dataclasses.replace(cfg, distributed=DistributedConfig())
    if own.coordinator is None and name is None:
        return cfg
    if cfg.out is None:
        raise InputError("a run of several processes needs a folder that all of them see; add --out FOLDER")
    where = f"coordinator {own.coordinator}" if name is None or own.coordinator else f"what {name} says"
    try:
        if own.coordinator is not None:
            jax.distributed.initialize(
                own.coordinator, own.num_processes, own.process_id, initialization_timeout=own.timeout
            )
        else:
            jax.distributed.initialize(cluster_detection_method=name, initialization_timeout=own.timeout)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of this run do not find each other by {where}: {first_line(error)}") from None
    counts = [len(group) for group in _devices_by_process().values()]
    if len(set(counts)) > 1:
        raise InputError(f"the processes have {counts} devices; start each with as many as the others")
    return cfg


def _devices_by_process() -> dict[int, list[jax.Device]]:
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        found.setdefault(device.process_index, []).append(device)
    return found


def is_first() -> bool:
    """Whether this process is the one that writes; true where it is alone."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_of(flag: bool) -> bool:
    """Return whether any process says so."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))


def check_same(number: int, what: str) -> None:
    """Raise InputError in all processes where they do not see the same number."""
    if jax.process_count() == 1:
        return
    seen = np.asarray(multihost_utils.process_allgather(np.asarray([number], np.int32))).reshape(-1)
    if len(set(seen.tolist())) > 1:
        raise InputError(f"the processes see different {what}; put --out on a file system that all hosts share")


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Return arrays of the host, which all processes have alike, on the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def spread(leaf: Any) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(spread, tree)


def fetch(tree: PyTree) -> PyTree:
    """Return NumPy arrays of what may be spread over the devices of all processes; every process calls it."""
    return jax.tree.map(_fetch_leaf, tree) if jax.process_count() > 1 else jax.device_get(tree)


def localize(tree: PyTree) -> PyTree:
    """Return arrays that this process works on alone, as they are where it is alone."""
    return jax.tree.map(jax.numpy.asarray, fetch(tree)) if jax.process_count() > 1 else tree


def _fetch_leaf(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        sharding = leaf.sharding
        assert isinstance(sharding, NamedSharding), sharding
        leaf = _replicate(NamedSharding(sharding.mesh, P()))(leaf)
    return np.asarray(leaf)


@functools.cache
def _replicate(sharding: NamedSharding) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)
