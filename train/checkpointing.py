"""Training states on disk: the last few, written in the background, each whole or not at all.

A checkpoint is a folder, `state.safetensors` and `position.json`. It counts when its manifest is there, which is
written last, and its files are compared with that before use.
"""

import concurrent.futures
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from spotlight_jax import files, manifest
from spotlight_jax.errors import InputError
from spotlight_jax.selector.checkpoint import stored_name
from train.processes import fetch
from train.step import TrainState

_ARRAYS, _POSITION = "state.safetensors", "position.json"


class CheckpointStore:
    """Checkpoints of one run: training state, step, position in the text, PRNG key."""

    def __init__(self, folder: pathlib.Path, keep: int, is_written: bool = True) -> None:
        """Open the folder, which need not be there yet.

        Args:
            keep: how many checkpoints.
            is_written: False where another process writes: `save` then only takes part in gathering the state.
        """
        self._is_written = is_written
        self._folder, self._keep = folder, keep
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None
        self._newest: int | None = None  # given to be written by this process, or loaded

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return newest_step(self._folder)[0]

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Save in the background; a step that is already saved is left as it is.

        Raises: OSError where the checkpoint before this one could not be written.
        """
        self.wait()
        if step == self._newest:
            return
        named = _named(state)
        arrays = dict(
            zip(named, map(np.array, fetch([*named.values()])), strict=True)
        )  # copies: a step donates its state
        self._newest = step
        if not self._is_written:
            return
        self._writing = self._background.submit(self._write, step, arrays, position)

    def _write(self, step: int, arrays: dict[str, np.ndarray], position: dict[str, Any]) -> None:
        folder = self._folder / str(step)
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed while it wrote
        try:
            folder.mkdir(parents=True)
            files.write_bytes(folder / _ARRAYS, safetensors.numpy.save(arrays))
            files.write_json(folder / _POSITION, position)
            manifest.seal_folder(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for old in _steps(self._folder)[self._keep :]:
            shutil.rmtree(self._folder / str(old))

    def wait(self) -> None:
        """Wait for what is being written; raises OSError where it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self, template: TrainState) -> tuple[int, TrainState, dict[str, Any], list[str]]:
        """Load the newest sound checkpoint, with a line for each newer one, which is damaged and is removed.

        Raises: InputError where there is none or its arrays are other ones.
        """
        self.wait()
        step, damaged = newest_step(self._folder)
        if step is None:
            raise InputError("the run has no checkpoint to resume from; start it anew in another folder")
        folder = self._folder / str(step)
        arrays, expected = safetensors.numpy.load_file(folder / _ARRAYS), _named(template)
        if _kinds(arrays) != _kinds(expected):
            raise InputError(f"checkpoint {step} is of another model or config: its arrays have other names or shapes")
        leaves = [jax.numpy.asarray(arrays[name]) for name in expected]
        position = json.loads((folder / _POSITION).read_text(encoding="utf-8"))
        for other in damaged:
            shutil.rmtree(self._folder / str(other))
        self._newest = step
        told = [f"checkpoint {other} is damaged ({why}); taking {step}" for other, why in damaged.items()]
        return step, jax.tree.unflatten(jax.tree.structure(template), leaves), position, told

    def close(self) -> None:
        """Wait for what is being written; may be called again."""
        try:
            self.wait()
        finally:
            self._background.shutdown()


def newest_step(folder: pathlib.Path) -> tuple[int | None, dict[int, str]]:
    """Step of the newest sound checkpoint, None without one, and what is wrong with each newer one."""
    damaged: dict[int, str] = {}
    for step in _steps(folder):
        damage = manifest.find_damage(folder / str(step))
        if damage is None:
            return step, damaged
        damaged[step] = damage
    return None, damaged


def _steps(folder: pathlib.Path) -> list[int]:
    """Return the steps that have a folder, the newest first."""
    return sorted(
        (int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()), reverse=True
    )


def _named(tree: Any) -> dict[str, Any]:
    """Return arrays by their paths, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(stored_name(jax.tree_util.keystr((key,), simple=True)) for key in path): leaf for path, leaf in leaves
    }


def _kinds(arrays: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in arrays.items()}
