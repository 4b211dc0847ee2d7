"""Weights that stay in their files: one layer at a time is read, the next one while it is at work."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.params import Stored, match_leaves, read_leaf
from spotlight_jax.models.sharding import Path


class DiskParams(Mapping[str, Any]):
    """A decoder's parameter tree, whose parts are NumPy arrays that are read as they are asked for.

    The host holds the embedding and the last and the next layer.
    """

    def __init__(self, leaves: Mapping[Path, Stored], layers: int, dtype: Any) -> None:
        """Read nothing yet.

        Args:
            leaves: every leaf's tensor in its file, by its path.
            layers: of the decoder.
            dtype: of what is given out.
        """
        self._leaves, self._layers, self._dtype = dict(leaves), layers, np.dtype(dtype)
        self._kept: dict[str, Any] = {}
        self._last: tuple[str, Any] = ("", None)
        self._next: tuple[str, concurrent.futures.Future[Any] | None] = ("", None)
        self._reader = concurrent.futures.ThreadPoolExecutor(1)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tree's parts."""
        return iter(dict.fromkeys(path[0] for path in self._leaves))

    def __len__(self) -> int:
        """Count the tree's parts."""
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Any:
        """Read a part of the tree, and begin to read the layer that follows it."""
        if not name.startswith("layer_"):
            if name not in self._kept:
                self._kept[name] = self._read(name)
            return self._kept[name]
        if self._last[0] != name:
            ahead, reading = self._next
            self._last = name, reading.result() if ahead == name and reading is not None else self._read(name)
            following = f"layer_{(int(name.removeprefix('layer_')) + 1) % self._layers}"
            self._next = following, self._reader.submit(self._read, following)
        return self._last[1]

    def _read(self, name: str) -> Any:
        tree: dict[str, Any] = {}
        found = {path[1:]: (path, value) for path, value in self._leaves.items() if path[0] == name}
        if not found:
            raise KeyError(name)
        for inner, (path, value) in found.items():
            branch = tree
            for part in inner[:-1]:
                branch = branch.setdefault(part, {})
            branch[inner[-1]] = np.ascontiguousarray(read_leaf(path, value), self._dtype)
        return tree


def open_params(
    weights: Iterable[tuple[str, Stored]], name_of: Callable[[Path], str], cfg: DecoderConfig, dtype: Any, source: str
) -> DiskParams:
    """Return the tree of a model's files, every name and shape checked; args and errors as `match_leaves`."""
    leaves = {path: value for path, _, value in match_leaves(weights, name_of, cfg, source)}
    return DiskParams(leaves, cfg.layers, dtype)
