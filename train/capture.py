"""One forward pass of the frozen model that hands out what the losses need: sampled queries and keys of all layers."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, PRNGKeyArray, Shaped

from spotlight_jax.attention import causal_attention
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, apply_layer, embed_tokens
from spotlight_jax.models.sharding import RULES
from train.processes import put

AXIS = "layers"  # windows are spread over it in the forward pass, unless `--mesh` is given, and layers in the loss


def make_mesh(forward: Mesh | None = None) -> Mesh:
    """Make a mesh of all devices along the one axis, or of those of a split model's mesh, in its order."""
    if forward is None:
        return jax.make_mesh((len(jax.devices()),), (AXIS,), axis_types=(AxisType.Auto,))
    return Mesh(forward.devices.reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def windows_axis(mesh: Mesh) -> str:
    """Return the axis of a mesh that windows are spread over in the forward pass."""
    return AXIS if AXIS in mesh.shape else RULES["batch"]


@flax.struct.dataclass
class Captured:
    """Post-RoPE queries and keys of some windows; leaves of a whole model lead with a layer axis."""

    queries: Shaped[Array, "*lead picks q_heads head_dim"]
    picks: Int32[Array, "*lead picks"]  # places of the queries in the window
    keys: Shaped[Array, "*lead kv_len kv_heads head_dim"]


def draw_picks(key: PRNGKeyArray, window: int, count: int, draws: int) -> Int32[Array, "picks"]:
    """Draw places in a window: `draws` samples of `count` queries without repeats, each in ascending order."""
    keys = jax.random.split(key, draws)
    return jax.vmap(lambda k: jnp.sort(jax.random.permutation(k, window)[:count]))(keys).reshape(-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "mesh", "passes_on"))
def capture_layer(
    layer_params: Params,
    x: Shaped[Array, "windows window embed"],
    positions: Int32[Array, "windows window"],
    picks: Int32[Array, "windows picks"],
    cfg: DecoderConfig,
    mesh: Mesh,
    passes_on: bool = True,
) -> tuple[Shaped[Array, "windows window embed"] | None, Captured]:
    """Return the stream after one layer, and what the layer sees; both spread over the mesh by window, and what it sees
    by heads, too, on a mesh with the axes of `models.sharding`.

    Args:
        positions: of the tokens, for RoPE; a query sees the tokens before it in the window, wherever they stand.
        passes_on: False leaves attention and MLP out, since queries and keys need only the layer's input, and passes
            on None.
    """

    def attend(picks: Array, queries: Array, keys: Array, values: Array) -> tuple[Array, Captured]:
        picked = jnp.take_along_axis(queries, picks[:, :, None, None], axis=1)
        outputs = causal_attention(queries, keys, values) if passes_on else queries
        return outputs, Captured(queries=picked, picks=picks, keys=keys)

    def capture_own(layer_params: Params, x: Array, positions: Array, picks: Array) -> tuple[Array | None, Captured]:
        after, seen = apply_layer(layer_params, x, positions, functools.partial(attend, picks), cfg)
        return after if passes_on else None, seen

    if AXIS not in mesh.shape:  # weights and heads are split: each device attends for its own
        rows: Any = P(windows_axis(mesh))
        heads: Any = P(windows_axis(mesh), None, RULES["heads"])
        in_specs, out_specs = (rows, heads, heads, heads), (heads, Captured(queries=heads, picks=rows, keys=heads))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows))
        return capture_own(layer_params, x, positions, picks)
    spread = (P(), P(AXIS), P(AXIS), P(AXIS))
    own = jax.shard_map(capture_own, mesh=mesh, in_specs=spread, out_specs=P(AXIS), check_vma=False)
    return own(layer_params, x, positions, picks)


@functools.partial(jax.jit, static_argnames="mesh")
def stack_layers(captured: list[Captured], mesh: Mesh) -> Captured:
    """Stack layers into a tree that leads with a layer axis over the mesh, the last layer repeated to fill it."""
    missing = padded_layers(len(captured), mesh) - len(captured)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured, *captured[-1:] * missing)
    return jax.lax.with_sharding_constraint(stacked, NamedSharding(mesh, P(AXIS)))


def capture(
    params: Params,
    tokens: Int32[Array, "windows window"],
    positions: Int32[Array, "ranges windows window"],
    picks: Int32[Array, "windows picks"],
    cfg: DecoderConfig,
    mesh: Mesh,
) -> Captured:
    """Return what every layer sees of some windows, for one way after another of placing them: leaves
    `[ranges * layers, windows, ...]`, the first axis spread over the mesh's devices.

    The model is frozen, so windows can be passed forward at the same time on different devices (their number must be a
    multiple of the devices along `windows_axis`) before their steps are taken one after another: the result is that of
    one device. Layers run one by one, one compiled layer serving all. Where the mesh does not divide the layers, the
    last one is repeated. Weights that are NumPy arrays stay with the host, but for the layer that is at work.
    """
    seen = [capture_layers(params, tokens, own, picks, cfg, mesh) for own in positions]
    by_layers = mesh if AXIS in mesh.shape else make_mesh(mesh)
    return stack_layers(list(itertools.chain.from_iterable(seen)), by_layers)


def capture_layers(
    params: Params,
    tokens: Int32[Array, "windows window"],
    positions: Int32[Array, "windows window"],
    picks: Int32[Array, "windows picks"],
    cfg: DecoderConfig,
    mesh: Mesh,
) -> Iterator[Captured]:
    """Yield what one layer after the other sees of some windows: leaves `[windows, ...]`. Args as `capture`."""
    spread = NamedSharding(mesh, P(windows_axis(mesh)))
    positions, picks = put((positions, picks), spread)
    table = params["embed"]["table"]
    is_on_host = isinstance(table, np.ndarray)
    x = put(table[np.asarray(tokens)], spread) if is_on_host else embed_tokens(params, put(tokens, spread), cfg)
    for layer in range(cfg.layers):
        x, seen = capture_layer(params[f"layer_{layer}"], x, positions, picks, cfg, mesh)
        yield seen
        if is_on_host:
            jax.block_until_ready(x)  # else all layers would be sent ahead


def padded_layers(layers: int, mesh: Mesh) -> int:
    """Return the number of layers, rounded up to a multiple of the mesh's size."""
    return -(-layers // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnames=("count",))
def take_step(captured: Captured, window: Int32[Array, ""], draw: Int32[Array, ""], count: int) -> Captured:
    """Return one window and one draw of `count` queries out of what was captured: what one step trains on."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, window, axis=1, keepdims=False), captured)
    start = draw * count
    return one.replace(
        queries=jax.lax.dynamic_slice_in_dim(one.queries, start, count, axis=1),
        picks=jax.lax.dynamic_slice_in_dim(one.picks, start, count, axis=1),
    )
