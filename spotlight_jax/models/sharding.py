"""Where arrays lie on several devices: one table from the logical axes of weights, caches and selectors to a mesh.

A leaf is known by its name, and its name says what its axes are; `RULES` says which axis of the mesh each of those is
split over. XLA partitions what it understands by these placements alone; what it cannot see through, such as a kernel,
runs under `by_heads`. An axis that the mesh does not divide is kept whole on each device; `check_mesh` refuses meshes
for which that would be heads or the MLP's width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from spotlight_jax.config.mesh import AXES, describe_mesh
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig

MOST_CONTEXT = 128  # what it is divided by divides every cache's slots

Axes = tuple[str | None, ...]  # logical axes of an array
Path = tuple[str, ...]  # of a leaf in the parameter tree
Placement = Callable[[Path, tuple[int, ...]], NamedSharding]  # where a leaf of some shape lies

# logical axis: axis of the mesh. Heads next to each other in a weight's columns are whole heads on each device.
RULES = {"batch": "data", "heads": "model", "mlp": "model", "vocab": "model", "kv_len": "context"}

# part of the parameter tree: its kernel's axes, [in, out]; a bias has the last of them, norms are whole everywhere
_KERNELS: dict[str, Axes] = {
    "head": (None, "vocab"),
    "q": (None, "heads"),
    "k": (None, "heads"),
    "v": (None, "heads"),
    "o": ("heads", None),
    "gate": (None, "mlp"),
    "up": (None, "mlp"),
    "down": ("mlp", None),
}
_HEAD_LEAVES = {
    "bit_weights": 3, "mean": 2, "axes": 3, "levels": 2, "head_assignment": 3, "log_head_scale": 1, "scale": 2,
    "hidden_kernel": 3, "hidden_bias": 2, "out_kernel": 3, "out_bias": 2, "rotation": 3,
    "cut": 2, "log_mass": 2, "spread": 1, "slope": 2, "gate": 1,
}  # fmt: skip
# leaves of caches and of one layer's hash functions; those of several sets of them lead with more axes, kept whole
_LEAVES: dict[str, Axes] = {
    "keys": ("batch", "kv_len", "heads", None),
    "values": ("batch", "kv_len", "heads", None),
    "codes": ("batch", "heads", None, "kv_len"),
    "moments.count": ("batch",),
    "moments.mean": ("batch", "heads", None),
    "moments.scatter": ("batch", "heads", None, None),
    "moments.covariance": ("batch", "heads", None, None),
    "sets": ("batch",),
    **{name: ("heads", *[None] * (rank - 1)) for name, rank in _HEAD_LEAVES.items()},
}
_HEADS: Axes = ("batch", None, "heads", None)  # of queries, keys and values on their way to attention


def open_mesh(sizes: Mapping[str, int], cfg: DecoderConfig, rest: str = "context") -> Mesh | None:
    """Return the mesh over the first devices; None for a single one.

    Args and errors as `check_mesh`.
    """
    check_mesh(sizes, cfg, len(jax.devices()), rest)
    counts = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(counts) == 1:
        return None
    devices = jax.devices()[: math.prod(counts)]
    return jax.make_mesh(tuple(counts), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(sizes: Mapping[str, int], cfg: DecoderConfig, devices: int, rest: str = "context") -> None:
    """Raise InputError for a mesh that this model or this machine cannot have.

    Args:
        sizes: devices along each axis.
        cfg: the decoder's.
        devices: that there are.
        rest: axis that takes the devices that heads cannot be split over.
    """
    wanted, told = math.prod(sizes.values()), f"--mesh {describe_mesh(dict(sizes))}"
    if wanted > devices:
        raise InputError(f"{told} is {wanted} devices, and there are {devices}; give fewer (`spotlight doctor`)")
    parts = sizes.get("model", 1)
    for what, count in (("KV heads", cfg.kv_heads), ("columns of the MLP", cfg.mlp)):
        if count % parts:
            further = split_further(sizes, cfg, rest)
            fitting = [further] if further else [one for one in meshes_of(cfg) if one["model"] <= devices]
            given = " or ".join(map(describe_mesh, fitting))
            raise InputError(f"{told} does not divide the model's {count} {what}; give {given}")
    if MOST_CONTEXT % sizes.get("context", 1):
        raise InputError(f"{told}: caches are split over a power of two of devices, at most {MOST_CONTEXT}")


def meshes_of(cfg: DecoderConfig) -> list[dict[str, int]]:
    """Return all ways to split the model's heads and its MLP over devices, the fewest first."""
    return [{"model": n} for n in range(1, cfg.kv_heads + 1) if cfg.kv_heads % n == 0 and cfg.mlp % n == 0]


def split_further(sizes: Mapping[str, int], cfg: DecoderConfig, rest: str = "context") -> dict[str, int] | None:
    """Return the mesh of as many devices whose heads are split as far as they can be; None where there is none.

    Args:
        sizes: devices along each axis, of `model` more than heads can be split over.
        cfg: the decoder's.
        rest: axis that takes the devices that are left.
    """
    wanted, others = sizes.get("model", 1), {axis: count for axis, count in sizes.items() if axis != "model"}
    parts = max(one["model"] for one in meshes_of(cfg) if wanted % one["model"] == 0)
    split = others.get(rest, 1) * (wanted // parts)
    if parts == 1 or (rest == "context" and MOST_CONTEXT % split):
        return None
    found = {**others, "model": parts, rest: split}
    return {axis: found[axis] for axis in AXES if axis in found}


def smallest_fit(cfg: DecoderConfig, devices: int, fits: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Return the mesh of the fewest devices that fits; none where a single device does, and where no mesh does.

    Where there are more devices than heads can be split over, the tokens of each sequence are split, too.
    """
    by_model = [sizes for sizes in meshes_of(cfg) if sizes["model"] <= devices]
    most, context = by_model[-1], (2**power for power in range(1, MOST_CONTEXT.bit_length()))
    further = [{**most, "context": count} for count in context if most["model"] * count <= devices]
    sizes = next((sizes for sizes in (*by_model, *further) if fits(sizes)), {})
    return sizes if math.prod(sizes.values()) > 1 else {}


def config_of_device(cfg: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
    """Return the decoder whose weights, caches and products are those of one device of a mesh."""
    parts = sizes.get("model", 1)
    vocab = cfg.vocab // parts if cfg.vocab % parts == 0 else cfg.vocab
    heads = {"q_heads": cfg.q_heads // parts, "kv_heads": cfg.kv_heads // parts}
    sizes_of: dict[str, Any] = {**heads, "mlp": cfg.mlp // parts, "vocab": vocab, "stop_tokens": ()}
    return dataclasses.replace(cfg, **sizes_of)


def weight_axes(path: Path) -> Axes:
    """Return the logical axes of a leaf of the parameter tree."""
    *_, part, leaf = path
    if part == "embed":
        return ("vocab", None)
    kernel = _KERNELS.get(part)
    if kernel is None:
        return (None,)
    return kernel if leaf == "kernel" else kernel[-1:]


def spec_of(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return how an array is split whose last axes are these; an axis that the mesh does not divide is whole."""
    whole = (None,) * (len(shape) - len(axes))

    def place(axis: str | None, size: int) -> str | None:
        name = RULES.get(axis or "")
        return name if name is not None and mesh.shape.get(name, 1) > 1 and size % mesh.shape[name] == 0 else None

    return P(*(place(axis, size) for axis, size in zip((*whole, *axes), shape, strict=True)))


def weight_sharding(path: Path, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return where a leaf of the parameter tree lies."""
    return NamedSharding(mesh, spec_of(weight_axes(path), shape, mesh))


def weights_on(mesh: Mesh | None) -> Placement | None:
    """Return where weights lie on a mesh; None for a single device."""
    return None if mesh is None else lambda path, shape: weight_sharding(path, shape, mesh)


def shardings_of(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return where each leaf of a tree lies, in the order of its leaves: weights (dicts), caches, hash functions, and
    anything else whole on each device."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axes = weight_axes(("", *keys)) if keys else _LEAVES.get(_name(path), ())
        found.append(NamedSharding(mesh, spec_of(axes, leaf.shape, mesh)))
    return found


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of a dataclass's leaf, with its owner's where that is moments; "" for what lies in tuples."""
    names = [entry.name for entry in path[-2:] if isinstance(entry, jax.tree_util.GetAttrKey)]
    return ".".join(names[-2:] if names[:1] == ["moments"] else names[-1:])


def place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Return the tree where `shardings_of` says; leaves that lie there are not moved."""
    if mesh is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, jax.device_put(leaves, shardings_of(tree, mesh)))


def build(make: Callable[[], PyTree], mesh: Mesh | None) -> PyTree:
    """Return the tree that `make` gives, each device making its own part where there is a mesh."""
    if mesh is None:
        return make()
    found: dict[str, Any] = {}

    def make_flat() -> list[Any]:
        tree = make()
        found.update(structure=jax.tree.structure(tree), shardings=shardings_of(tree, mesh))
        return jax.tree.leaves(tree)

    jax.eval_shape(make_flat)
    return jax.tree.unflatten(found["structure"], jax.jit(make_flat, out_shardings=found["shardings"])())


def tokens_over(mesh: Mesh | None) -> str | None:
    """Return the axis that the tokens of each sequence are split over; None where each lies on one device."""
    return "context" if mesh is not None and mesh.shape["context"] > 1 else None


def mesh_of(params: PyTree) -> Mesh | None:
    """Return the mesh that weights lie on; None for a single device, and for the host's arrays."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh if sharding.mesh.size > 1 and sharding.mesh.axis_names == AXES else None


def by_heads(
    attend: Callable[..., tuple[Array, PyTree]], mesh: Mesh | None, layer: PyTree, selector: PyTree, *rows: Any
) -> Callable[[Array, Array, Array], tuple[Array, PyTree]]:
    """Return what a decoder layer attends with: `attend` on each device for its own heads and sequences.

    Heads share nothing: hashing, scoring, selecting, reading and estimating need no communication between devices.

    Args:
        attend: (queries, keys, values, layer, selector, *rows) to outputs and the layer's cache.
        mesh: None runs it as it is.
        layer: the layer's cache.
        selector: the layer's hash functions, or None.
        rows: arrays that lead with the batch, or None.
    """
    if mesh is None:
        return lambda queries, keys, values: attend(queries, keys, values, layer, selector, *rows)

    def attend_spread(queries: Array, keys: Array, values: Array) -> tuple[Array, PyTree]:
        leaves, structure = jax.tree.flatten((queries, keys, values, layer, selector, *rows))
        heads = [spec_of(_HEADS, new.shape, mesh) for new in (queries, keys, values)]
        states = [sharding.spec for sharding in shardings_of((layer, selector), mesh)]
        others = [spec_of(("batch", *[None] * (row.ndim - 1)), row.shape, mesh) for row in jax.tree.leaves(rows)]

        def attend_own(*leaves: Array) -> list[Array]:
            out, appended = attend(*jax.tree.unflatten(structure, leaves))
            return [out, *jax.tree.leaves(appended)]

        cached = [sharding.spec for sharding in shardings_of(layer, mesh)]
        out, *appended = jax.shard_map(
            attend_own,
            mesh=mesh,
            in_specs=tuple(heads + states + others),
            out_specs=[heads[0], *cached],
            check_vma=False,
        )(*leaves)
        return out, jax.tree.unflatten(jax.tree.structure(layer), appended)

    return attend_spread


def on_own_slots(function: Callable[..., PyTree], mesh: Mesh, layer: PyTree, *rows: Any) -> PyTree:
    """Return the moments that `function` gives of a layer and rows of a batch, each device with its own part of them.

    Args:
        function: (layer, *rows) to moments.
        mesh: of which each device holds some slots.
        layer: the layer's cache.
        rows: arrays that lead with the batch.
    """
    leaves, structure = jax.tree.flatten(layer)
    own = [sharding.spec for sharding in shardings_of(layer, mesh)]
    others = [spec_of(("batch",), row.shape, mesh) for row in rows]
    moments = jax.tree.unflatten(structure, own).moments

    def run(leaves: list[Array], *rows: Any) -> PyTree:
        return function(jax.tree.unflatten(structure, leaves), *rows)

    return jax.shard_map(run, mesh=mesh, in_specs=(own, *others), out_specs=moments, check_vma=False)(leaves, *rows)


def bytes_per_device(tree: PyTree, mesh: Mesh) -> int:
    """Return the bytes of a tree of arrays or shapes that one device holds."""
    pairs = zip(shardings_of(tree, mesh), jax.tree.leaves(tree), strict=True)
    return sum(math.prod(there.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for there, leaf in pairs)
