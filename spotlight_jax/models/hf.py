"""A decoder's config and weights from a folder in Hugging Face's layout, or from a hub id."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from spotlight_jax import hub
from spotlight_jax.errors import InputError, naming
from spotlight_jax.models.config import DecoderConfig, config_from_hf
from spotlight_jax.models.sharding import Path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# of weights; what is quantised comes with scales, which are not read
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def fetch_hub(name: str, weights: bool = True) -> pathlib.Path:
    """Return the local folder of a hub model, fetched into huggingface_hub's cache where it is not there yet.

    Raises InputError when the hub cannot be reached or has no such model.
    """
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*.safetensors"] if weights else [])
    return hub.fetch(name, patterns, "model")


def read_json(path: pathlib.Path) -> Any:
    """Read a JSON file's value. Raises InputError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the folder is not a complete Hugging Face model") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets without end
        raise InputError(f"{path}: not valid JSON ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_fields(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds an object with fields. Raises as `read_json`."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a {type(fields).__name__}, not an object with fields; fetch it again")
    return fields


def load_hf_config(folder: pathlib.Path) -> DecoderConfig:
    """Return the decoder that the folder's `config.json` describes; InputError lines start with the file's path.

    Of `generation_config.json`, where there is one, the ids that end a text are read.
    """
    path, generation = folder / "config.json", folder / "generation_config.json"
    fields = read_fields(path)
    more = read_fields(generation) if generation.exists() else {}
    with naming(path):
        return config_from_hf(fields, more)


class HfTensor:
    """A tensor of a safetensors file, read slice by slice in the file's dtype, bfloat16 too."""

    def __init__(self, path: pathlib.Path, slices: Any, dtype: Any) -> None:
        """Take what `safe_open` gives of it; nothing is read yet."""
        self.shape, self.dtype = tuple(slices.get_shape()), np.dtype(dtype)
        self._path, self._slices = path, slices

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read one slice of each axis; raises InputError where the file cannot be read."""
        try:
            return self._slices[index]
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(_damaged(self._path, error)) from None


def _damaged(path: pathlib.Path, error: Exception) -> str:
    return f"{path}: truncated or corrupt safetensors file ({error}); fetch it again"


def read_hf_weights(folder: pathlib.Path) -> Iterator[tuple[str, HfTensor]]:
    """Name and tensor of all that the folder holds, one shard open at a time.

    Raises InputError naming the file that is missing, truncated or corrupt.
    """
    for path in _shards(folder):
        try:
            with safetensors.safe_open(path, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith(".rotary_emb.inv_freq"):  # a buffer that old checkpoints hold
                        continue
                    slices = shard.get_slice(name)
                    kind = slices.get_dtype()
                    if kind not in _DTYPES:
                        raise InputError(
                            f"{path}: tensor {name} is stored as {kind}, which is not read without its scales; use a "
                            f"model in one of {', '.join(_DTYPES)}"
                        )
                    yield name, HfTensor(path, slices, _DTYPES[kind])
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; the model's shards are incomplete") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(_damaged(path, error)) from None


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the weight files: one that holds all, as transformers looks for it first, or those of the index."""
    index = folder / _INDEX
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not index.exists():
        raise InputError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; other weight formats are not read")
    fields = read_json(index)
    files = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{index}: holds no weight_map from tensor names to files; fetch it again")
    names = sorted(set(files.values()))
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise InputError(f"{index}: shard {name!r} is not a file of the folder")
    return [folder / name for name in names]


def hf_name(path: Path) -> str:
    """Return Hugging Face's name of a leaf of the parameter tree."""
    outside = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    if path[0] in outside:
        return outside[path[0]]
    layer, part, leaf = path
    return f"model.layers.{layer.removeprefix('layer_')}.{_PARTS[part]}.{'bias' if leaf == 'bias' else 'weight'}"
