"""A decoder's config and weights from a GGUF file (architectures llama, qwen2, qwen3)."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from spotlight_jax.errors import InputError, naming
from spotlight_jax.models.config import DecoderConfig, RopeConfig, RopeKind, nearest, stop_tokens
from spotlight_jax.models.gguf_file import GgufFile
from spotlight_jax.models.sharding import Path

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# metadata fields (after the architecture's name) that change the computation, and are not implemented
_REFUSED = ("expert_count", "attention.sliding_window", "logit_scale", "attention.clamp_kqv", "attention.alibi_bias")
_STOPS = ("eos", "eot", "eom")  # end of text, of a turn, and of a message that a tool will answer
# GGUF's names of a layer's parts
_PARTS = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def config_from_gguf(file: GgufFile) -> DecoderConfig:
    """Return the decoder that a GGUF file's metadata and list of tensors describe.

    Raises InputError for another architecture, a missing field or a feature that is not implemented.
    """
    with naming(file.path):
        return _read_config(file)


def _read_config(file: GgufFile) -> DecoderConfig:
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise InputError(f"GGUF architecture {arch!r} is not supported{nearest(arch, ARCHITECTURES)}")
    parts = _number(file, "split.count", int, 1)
    if parts > 1:
        part = _number(file, "split.no", int, 0) + 1
        raise InputError(
            f"this is part {part} of {parts} of a split model; merge the parts (llama-gguf-split --merge) and give the "
            "merged file"
        )
    for name in _REFUSED:
        if file.metadata.get(f"{arch}.{name}"):
            raise InputError(f"{arch}.{name} = {file.metadata[f'{arch}.{name}']!r} is not implemented")
    if "token_embd.weight" not in file.tensors:
        raise InputError("tensor token_embd.weight is missing; the file is incomplete")
    table = file.tensors["token_embd.weight"]
    if len(table.shape) != 2:
        raise InputError(f"tensor token_embd.weight has shape {table.shape}, not one row a token")
    vocab, embed = table.shape
    q_heads = _field(file, "attention.head_count", int)
    head_dim = _field(file, "attention.key_length", int, embed // max(q_heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if _field(file, name, int, head_dim) != head_dim:
            raise InputError(f"{arch}.{name} differs from head_dim {head_dim}, which is not implemented")
    return DecoderConfig(
        vocab=vocab,
        embed=embed,
        layers=_field(file, "block_count", int),
        q_heads=q_heads,
        kv_heads=_field(file, "attention.head_count_kv", int, q_heads),
        head_dim=head_dim,
        mlp=_field(file, "feed_forward_length", int),
        max_len=_field(file, "context_length", int),
        rope=_rope(file),
        norm_eps=_field(file, "attention.layer_norm_rms_epsilon", float),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        tied="output.weight" not in file.tensors,
        stop_tokens=stop_tokens([_stop_id(file, name) for name in _STOPS], vocab),
    )


def _stop_id(file: GgufFile, name: str) -> int:
    """Return the id that ends a text, a turn or a message; -1 where none is named. Raises InputError for no id."""
    full = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(full, -1)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"metadata field {full} = {value!r} is not a token id")
    return value


def _field(file: GgufFile, name: str, kind: type, default: Any = None) -> Any:
    """Return the architecture's metadata field as one number of a kind. Raises InputError naming the field."""
    return _number(file, f"{file.metadata['general.architecture']}.{name}", kind, default)


def _number(file: GgufFile, full: str, kind: type, default: Any = None) -> Any:
    value = file.metadata.get(full, default)
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]  # one value per layer, all the same
    if value is None:
        raise InputError(f"metadata field {full} is missing; the file is incomplete")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"metadata field {full} = {value!r} is not one finite number")
    if kind(value) != value:
        raise InputError(f"metadata field {full} = {value!r} is not a whole number")
    return kind(value)


def _rope(file: GgufFile) -> RopeConfig:
    """Read RoPE from `rope.*`, and from the tensor `rope_freqs.weight` that carries LLaMA 3.1's scaling."""
    arch = file.metadata["general.architecture"]
    kinds: dict[str, RopeKind] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    name = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = _field(file, "rope.scaling.factor", float, 0.0)
    legacy = _field(file, "rope.scale_linear", float, 0.0)
    if legacy and not factor:
        name, factor = "linear", legacy
    if not isinstance(name, str) or name not in kinds:
        raise InputError(f"RoPE scaling {name!r} is not supported{nearest(name, kinds)}")
    divisors = None
    if "rope_freqs.weight" in file.tensors:
        divisors = tuple(file.read("rope_freqs.weight").reshape(-1).tolist())
    attention_factor = _field(file, "rope.scaling.attn_factor", float, 0.0)
    if attention_factor not in (0.0, 1.0):
        raise InputError(f"{arch}.rope.scaling.attn_factor = {attention_factor} is not implemented")
    return RopeConfig(
        kinds[name],
        theta=_field(file, "rope.freq_base", float, 10000.0),
        factor=factor or 1.0,
        trained_len=_field(file, "rope.scaling.original_context_length", int, _field(file, "context_length", int)),
        beta_fast=_field(file, "rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=_field(file, "rope.scaling.yarn_beta_slow", float, 1.0),
        divisors=divisors,
    )


class GgufTensor:
    """A tensor of a GGUF file, of which the rows asked for are read and dequantised to float32."""

    def __init__(self, file: GgufFile, name: str, heads: int | None) -> None:
        """Read nothing yet.

        Args:
            heads: whose rows llama.cpp interleaves: they come in Hugging Face's order. None: none.
        """
        self.shape = file.tensors[name].shape
        self._file, self._name, self._heads = file, name, heads

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read one slice of each axis; raises as `GgufFile.read`."""
        if self._heads is not None:
            return _unpermute(self._file.read(self._name), self._heads)[index]
        rows, *others = index
        if not others:
            return self._file.read(self._name)[index]
        return self._file.read(self._name, rows)[(slice(None), *others)]


def read_gguf_weights(file: GgufFile, cfg: DecoderConfig) -> Iterator[tuple[str, GgufTensor]]:
    """Name and tensor of all that the file holds; rows of q and k in Hugging Face's order."""
    permuted = file.metadata["general.architecture"] == "llama"
    for name in file.tensors:
        if name == "rope_freqs.weight":
            continue  # part of the config
        heads = {".attn_q.": cfg.q_heads, ".attn_k.": cfg.kv_heads} if permuted else {}
        yield name, GgufTensor(file, name, next((count for part, count in heads.items() if part in name), None))


def gguf_name(path: Path) -> str:
    """Return GGUF's name of a leaf of the parameter tree."""
    outside = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    if path[0] in outside:
        return outside[path[0]]
    layer, part, leaf = path
    return f"blk.{layer.removeprefix('layer_')}.{_PARTS[part]}.{'bias' if leaf == 'bias' else 'weight'}"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotated pairs in the rows of q and k: back to halves."""
    if rows.shape[0] % (2 * heads):
        return rows  # a wrong shape: the check against the config names it
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
