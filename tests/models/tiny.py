"""Tiny models of every family and RoPE scaling, whose weights follow from a tensor's name and shape alone.

So the parity run (torch) and the default tests (no torch) build the same model, and only logits are recorded.
"""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from spotlight_jax.models.config import DecoderConfig, config_from_hf
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.models.hf import hf_name

# every axis has its own size; 48 tokens lie well past the trained lengths below
BATCH, LENGTH, VOCAB = 2, 48, 61
KEPT_POSITIONS = (0, 7, 15, 33, 47)  # whose logits are recorded

_BASE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_LLAMA = _BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 40}
_QWEN2 = _BASE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 36}
_LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def _heads(queries: int, keys: int, **fields: Any) -> dict[str, Any]:
    return {"num_attention_heads": queries, "num_key_value_heads": keys, **fields}


CASES: dict[str, dict[str, Any]] = {
    "llama2": _LLAMA | _heads(4, 4, rope_theta=10000.0),
    "llama3": _LLAMA | _heads(8, 2, head_dim=6, rope_theta=500000.0, hidden_size=32),
    "llama31": _LLAMA | _heads(4, 2, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **_LLAMA3_ROPE}),
    "llama31_parameters": _LLAMA
    | _heads(4, 2, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA3_ROPE}),
    "llama_biases": _LLAMA | _heads(4, 2, attention_bias=True, mlp_bias=True, head_dim=8),
    "llama_linear": _LLAMA | _heads(4, 2, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_dynamic": _LLAMA | _heads(4, 2, max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama_yarn": _LLAMA | _heads(4, 2, rope_scaling={"rope_type": "yarn", **_YARN}),
    "smollm2": _LLAMA | _heads(9, 3, hidden_size=36, tie_word_embeddings=True, rope_theta=100000.0),
    "qwen2": _QWEN2 | _heads(7, 1, hidden_size=42, rope_theta=1000000.0),
    "qwen25_tied": _QWEN2 | _heads(14, 2, hidden_size=56, tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen25_yarn": _QWEN2
    | _heads(7, 1, hidden_size=42, rope_parameters={"rope_type": "yarn", "rope_theta": 1000000.0, **_YARN}),
    "qwen2_linear": _QWEN2
    | _heads(6, 2, hidden_size=48, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "qwen2_dynamic": _QWEN2
    | _heads(6, 2, hidden_size=48, max_position_embeddings=16)
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}},
    "qwen2_llama3": _QWEN2 | _heads(6, 2, hidden_size=48, rope_scaling={"rope_type": "llama3", **_LLAMA3_ROPE}),
    "qwen3": _QWEN3 | _heads(6, 2, head_dim=10, rope_theta=1000000.0),
    "qwen3_tied_biases": _QWEN3 | _heads(6, 2, head_dim=10, attention_bias=True, tie_word_embeddings=True),
    "qwen3_yarn": _QWEN3
    | _heads(6, 3, head_dim=10, rope_scaling={"rope_type": "yarn", "beta_fast": 16, "beta_slow": 2, **_YARN})
    | {"rope_theta": 1000000.0},
    "qwen3_yarn_factor": _QWEN3
    | _heads(6, 3, head_dim=10)
    | {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.3, "truncate": False, **_YARN}},
    "qwen3_linear": _QWEN3 | _heads(6, 3, head_dim=10, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "qwen3_dynamic": _QWEN3
    | _heads(6, 3, head_dim=10, max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "qwen3_llama3": _QWEN3 | _heads(6, 3, head_dim=10, rope_scaling={"rope_type": "llama3", **_LLAMA3_ROPE}),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of a name (Hugging Face's) and shape; large enough that attention is far from uniform."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name:
        return noise
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return noise * np.float32(gain / shape[1] ** 0.5)


def tokens() -> np.ndarray:
    """Ids `[BATCH, LENGTH]`, the same for every case."""
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def hf_weights(cfg: DecoderConfig) -> dict[str, np.ndarray]:
    """All tensors of a config, by Hugging Face's names and orientation."""
    weights = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(param_shapes(cfg, jnp.float32))[0]:
        keys = tuple(key.key for key in path)
        shape = leaf.shape[::-1] if keys[-1] == "kernel" else leaf.shape
        weights[hf_name(keys)] = weight(hf_name(keys), shape)
    return weights


def write_folder(folder: pathlib.Path, config: dict[str, Any], shards: int = 1) -> DecoderConfig:
    """A model folder in Hugging Face's layout (no tokenizer), in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    cfg = config_from_hf(config)
    weights = hf_weights(cfg)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return cfg
    placed = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[shard::shards]}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return cfg
