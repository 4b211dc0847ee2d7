"""One forward pass of the frozen model that hands out what the losses need: sampled queries and all keys of each layer."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PRNGKeyArray, Shaped

from spotlight_jax.attention import causal_attention
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params, apply_layer, embed_tokens


@flax.struct.dataclass
class Captured:
    """Post-RoPE queries and keys of some windows; leaves of a whole model lead with a layer axis."""

    queries: Shaped[Array, "*layers windows picks q_heads head_dim"]
    picks: Int32[Array, "*layers windows picks"]  # positions of the queries
    keys: Shaped[Array, "*layers windows kv_len kv_heads head_dim"]


def draw_picks(key: PRNGKeyArray, window: int, count: int, draws: int) -> Int32[Array, "picks"]:
    """Positions of `draws` independent samples of `count` queries without repeats, each in ascending order."""
    keys = jax.random.split(key, draws)
    return jax.vmap(lambda k: jnp.sort(jax.random.permutation(k, window)[:count]))(keys).reshape(-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="cfg")
def _capture_layer(layer_params, x, positions, picks, cfg):
    def attend(queries, keys, values):
        outputs = causal_attention(queries, keys, values)
        picked = jnp.take_along_axis(queries, picks[:, :, None, None], axis=1)
        return outputs, Captured(queries=picked, picks=picks, keys=keys)

    return apply_layer(layer_params, x, positions, attend, cfg)


def capture_layers(
    params: Params, tokens: Int32[Array, "windows window"], picks: Int32[Array, "windows picks"], cfg: DecoderConfig
) -> list[Captured]:
    """What each layer sees, one entry a layer. Layers run one by one: one compiled layer serves all."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    x = embed_tokens(params, tokens, cfg)
    captured = []
    for layer in range(cfg.layers):
        x, seen = _capture_layer(params[f"layer_{layer}"], x, positions, picks, cfg)
        captured.append(seen)
    return captured


@jax.jit
def stack_layers(captured: list[Captured]) -> Captured:
    """One tree with a leading layer axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured)
