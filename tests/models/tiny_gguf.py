"""Tiny GGUF files, written by the `gguf` package in the layout that llama.cpp's converter gives."""

import pathlib
from typing import Any

import gguf
import numpy as np

from spotlight_jax.models.config import config_from_hf
from tests.models import tiny

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<repo_name>"]


def byte_symbols() -> dict[int, str]:
    """Byte-level BPE's printable stand-in of every byte (GPT-2's scheme)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def vocabulary() -> list[str]:
    """Special tokens, all bytes, and what the merges make."""
    return SPECIALS + USER_DEFINED + sorted(byte_symbols().values()) + [merge.replace(" ", "") for merge in MERGES]


def add_tokenizer(writer: gguf.GGUFWriter, style: str | None = "smollm") -> None:
    """The metadata of a byte-level BPE tokenizer."""
    vocab = vocabulary()
    kinds = [3] * len(SPECIALS) + [4] * len(USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    if style is not None:
        writer.add_tokenizer_pre(style)
    writer.add_token_list(vocab)
    writer.add_token_types(kinds + [1] * (len(vocab) - len(kinds)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def gguf_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tiny model's weights by GGUF's names, q and k permuted for the llama architecture."""
    cfg = config_from_hf(config)
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, value in tiny.hf_weights(cfg).items():
        stem, leaf = name.rsplit(".", 1)
        if stem in outside:
            tensors[f"{outside[stem]}.{leaf}"] = value
            continue
        _, _, layer, part = stem.split(".", 3)
        heads = {"self_attn.q_proj": cfg.q_heads, "self_attn.k_proj": cfg.kv_heads}.get(part)
        if heads and config["model_type"] == "llama":
            # row (h, half, i) goes to (h, i, half)
            value = np.stack(np.split(value.reshape(heads, cfg.head_dim, -1), 2, axis=1), axis=2).reshape(value.shape)
        tensors[f"blk.{layer}.{_GGUF_NAMES[part]}.{leaf}"] = value
    return tensors


def write_gguf(
    path: pathlib.Path,
    config: dict[str, Any],
    *,
    tensors: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
    ends: dict[str, int] | None = None,
    style: str | None = "smollm",
) -> pathlib.Path:
    """A GGUF file of a tiny case; `fields` adds metadata under the architecture's name, `ends` ids that end a text."""
    arch = config["model_type"]
    cfg = config_from_hf(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(cfg.max_len)
    writer.add_embedding_length(cfg.embed)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.mlp)
    writer.add_head_count(cfg.q_heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    for name, value in (fields or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](
            f"{arch}.{name}", value
        )
    for name, index in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    add_tokenizer(writer, style)
    for name, value in (gguf_tensors(config) if tensors is None else tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
