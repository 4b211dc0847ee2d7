"""The LLaMA/Qwen decoder as flax.linen modules and pure functions over one parameter tree.

    {"embed": {"table": [vocab, embed]},
     "layer_0": {"attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"[, "q_norm", "k_norm"]}, ...,
     "norm": {"scale": [embed]},
     "head": {"kernel": [embed, vocab]}}          # absent when tied

Kernels are `[in, out]`; heads lie next to each other in the columns of q, k and v and in the rows of o. A layer never
attends by itself: it hands queries, keys and values to the caller's `attend`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PyTree

from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.rope import Angles, apply_rope, rope_angles
from spotlight_jax.models.sharding import Placement
from spotlight_jax.models.split_k import split_k_dot

# (queries, keys, values) -> (outputs like queries, anything the caller wants back); queries and keys are after RoPE
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
Params = Mapping[str, Any]


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Return normalised `x` times the learned scale, in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(self.dtype)


class DecoderLayer(nn.Module):
    """One block: attention and gated MLP, each behind a norm and added to the stream."""

    cfg: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch len embed"],
        positions: Int32[Array, "batch len"],
        attend: Attend,
        rope_len: Int32[Array, "*sequences"] | int | None = None,
    ) -> tuple[Float[Array, "batch len embed"], Any]:
        """Return the stream after this layer, and what `attend` returned apart from its outputs."""
        angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope, rope_len)
        hidden = RmsNorm(self.cfg.norm_eps, self.dtype, name="attention_norm")(x)
        outputs, aux = self._attention(hidden, angles, attend)
        x = x + outputs
        hidden = RmsNorm(self.cfg.norm_eps, self.dtype, name="mlp_norm")(x)
        dense = partial(nn.Dense, use_bias=self.cfg.mlp_bias, dtype=self.dtype, param_dtype=self.dtype)
        gated = nn.silu(dense(self.cfg.mlp, name="gate")(hidden)) * dense(self.cfg.mlp, name="up")(hidden)
        return x + dense(self.cfg.embed, name="down", dot_general=split_k_dot)(gated), aux

    def _attention(self, x: Array, angles: Angles, attend: Attend) -> tuple[Array, Any]:
        cfg = self.cfg
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        split = partial(dense, use_bias=cfg.qkv_bias, dot_general=split_k_dot)
        queries = split(cfg.q_heads * cfg.head_dim, name="q")(x)
        keys = split(cfg.kv_heads * cfg.head_dim, name="k")(x)
        values = split(cfg.kv_heads * cfg.head_dim, name="v")(x)
        queries = queries.reshape(*x.shape[:2], cfg.q_heads, cfg.head_dim)
        keys = keys.reshape(*x.shape[:2], cfg.kv_heads, cfg.head_dim)
        values = values.reshape(*x.shape[:2], cfg.kv_heads, cfg.head_dim)
        if cfg.qk_norm:
            queries = RmsNorm(cfg.norm_eps, self.dtype, name="q_norm")(queries)
            keys = RmsNorm(cfg.norm_eps, self.dtype, name="k_norm")(keys)
        outputs, aux = attend(apply_rope(queries, angles), apply_rope(keys, angles), values)
        outputs = outputs.reshape(*x.shape[:2], cfg.q_heads * cfg.head_dim)
        return dense(cfg.embed, use_bias=cfg.o_bias, name="o")(outputs), aux


def embed_tokens(params: Params, tokens: Int32[Array, "batch len"], cfg: DecoderConfig) -> Array:
    """Return embeddings `[batch, len, embed]` in the weights' dtype. Ids past the vocabulary are the caller's bug."""
    table = params["embed"]["table"]
    if table.shape != (cfg.vocab, cfg.embed):
        raise ValueError(f"embedding table {table.shape} does not fit config {(cfg.vocab, cfg.embed)}")
    return jnp.take(table, tokens, axis=0, mode="clip")


def apply_layer(
    layer_params: Params,
    x: Float[Array, "batch len embed"],
    positions: Int32[Array, "batch len"],
    attend: Attend,
    cfg: DecoderConfig,
    rope_len: Int32[Array, "*sequences"] | int | None = None,
) -> tuple[Float[Array, "batch len embed"], Any]:
    """Apply one layer. All layers share shapes, so one jitted caller serves them all.

    Args:
        layer_params: one `layer_i` subtree; its dtype is the layer's.
        x: the stream before the layer.
        positions: of the tokens in their sequences, for RoPE.
        attend: gets queries `[batch, len, q_heads, head_dim]`, keys and values `[batch, len, kv_heads, head_dim]`;
            returns outputs shaped like the queries, and anything else.
        cfg: the decoder's.
        rope_len: see `rope_angles`; only `dynamic` scaling reads it.
    """
    dtype = layer_params["q"]["kernel"].dtype
    return DecoderLayer(cfg, dtype).apply({"params": layer_params}, x, positions, attend, rope_len)


def unembed(params: Params, x: Float[Array, "batch len embed"], cfg: DecoderConfig) -> Float[Array, "batch len vocab"]:
    """Return float32 logits: the final norm, then the head."""
    normed: Any = RmsNorm(cfg.norm_eps, x.dtype).apply({"params": params["norm"]}, x)
    if cfg.tied:
        return jnp.einsum("btm,vm->btv", normed, params["embed"]["table"], preferred_element_type=jnp.float32)
    return jnp.einsum("btm,mv->btv", normed, params["head"]["kernel"], preferred_element_type=jnp.float32)


def unembed_params(params: Params) -> Params:
    """Return the part of the tree that `unembed` reads: a compiled caller takes it instead of all layers' weights."""
    return {name: params[name] for name in ("embed", "norm", "head") if name in params}


def param_shapes(cfg: DecoderConfig, dtype: Any) -> PyTree:
    """Return the parameter tree as `jax.ShapeDtypeStruct`s: what a loader has to fill."""
    return jax.eval_shape(lambda key: init_params(key, cfg, dtype), jax.random.key(0))


def init_params(key: Array, cfg: DecoderConfig, dtype: Any = jnp.float32, placement: Placement | None = None) -> Params:
    """Draw random weights of the decoder's shapes, for tests and benchmarks; the same ones on any mesh.

    Call it outside `jit`: it compiles one layer and runs that for each, which takes seconds even for large models.

    Args:
        placement: where they lie, each device drawing its own part; None: on the default device.
    """
    embed_key, head_key, *layer_keys = jax.random.split(key, cfg.layers + 2)
    params: dict[str, Any] = {
        "embed": {"table": _init_table(embed_key, (cfg.vocab, cfg.embed), dtype, placement, ("embed", "table"))},
        "norm": {"scale": _put_leaf(jnp.ones((cfg.embed,), dtype), ("norm", "scale"), placement)},
    }
    for index, layer_key in enumerate(layer_keys):
        params[f"layer_{index}"] = _init_layer(layer_key, cfg, dtype, placement)
    if not cfg.tied:
        table = _init_table(head_key, (cfg.embed, cfg.vocab), dtype, placement, ("head", "kernel"))
        params["head"] = {"kernel": table}
    return params


def _put_leaf(leaf: Array, path: tuple[str, ...], placement: Placement | None) -> Array:
    """Put a leaf of the tree where it lies."""
    if placement is None:
        return leaf
    sharding = placement(path, leaf.shape)
    is_drawn = isinstance(leaf, jax.core.Tracer)
    return jax.lax.with_sharding_constraint(leaf, sharding) if is_drawn else jax.device_put(leaf, sharding)


@partial(jax.jit, static_argnames=("shape", "dtype", "placement", "path"))
def _init_table(
    key: Array, shape: tuple[int, int], dtype: Any, placement: Placement | None, path: tuple[str, ...]
) -> Array:
    return _put_leaf(jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype), path, placement)


@partial(jax.jit, static_argnames=("cfg", "dtype", "placement"))
def _init_layer(key: Array, cfg: DecoderConfig, dtype: Any, placement: Placement | None) -> Params:
    x, positions = jnp.zeros((1, 1, cfg.embed), dtype), jnp.zeros((1, 1), jnp.int32)
    params = DecoderLayer(cfg, dtype).init(key, x, positions, lambda q, k, v: (q, None))["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _put_leaf(leaf, ("", *(entry.key for entry in path)), placement), params
    )
