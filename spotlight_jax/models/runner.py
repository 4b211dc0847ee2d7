"""The loop over a decoder's layers outside jit: one compiled layer serves all of them, whatever they attend with."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from spotlight_jax.attention import causal_attention
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Attend, Params, apply_layer, embed_tokens, unembed


@flax.struct.dataclass
class Dense:
    """Every query reads all tokens up to its own."""

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, None]:
        """See `Attend`."""
        return causal_attention(queries, keys, values), None


# what a layer attends with is a pytree: layers that differ in its arrays alone share a program
run_layer = jax.jit(apply_layer, static_argnames="cfg")


def run_layers(
    params: Params,
    x: Float[Array, "batch len embed"],
    positions: Int32[Array, "batch len"],
    attend_of: Callable[[int], Attend],
    cfg: DecoderConfig,
    rope_len: Int32[Array, "*sequences"] | None = None,
    layers: Iterable[int] | None = None,
) -> Iterator[tuple[Float[Array, "batch len embed"], Any]]:
    """Yield the stream after one layer after another, and what its attend gave back.

    Args:
        params: of the decoder.
        x: the stream before the first of them.
        positions: of the tokens in their sequences.
        attend_of: what a layer attends with.
        cfg: the decoder's.
        rope_len: see `rope_angles`.
        layers: which; None: all.
    """
    for layer in range(cfg.layers) if layers is None else layers:
        x, aux = run_layer(params[f"layer_{layer}"], x, positions, attend_of(layer), cfg, rope_len)
        yield x, aux


_unembed = jax.jit(unembed, static_argnames="cfg")


def forward(
    params: Params,
    tokens: Int32[Array, "batch len"],
    cfg: DecoderConfig,
    attend: Attend | None = None,
    positions: Int32[Array, "batch len"] | None = None,
) -> Float[Array, "batch len vocab"]:
    """Return float32 logits of every token.

    Args:
        params: of the decoder.
        tokens: ids.
        cfg: the decoder's.
        attend: used in every layer, what it returns beside outputs is dropped; None: dense causal attention.
        positions: None: 0, 1, ... in each sequence.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    own = Dense() if attend is None else attend
    x = embed_tokens(params, tokens, cfg)
    for after, _ in run_layers(params, x, positions, lambda layer: own, cfg):
        x = after
    return _unembed(params, x, cfg)
