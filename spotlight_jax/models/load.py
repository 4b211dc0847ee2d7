"""Base models by source: a folder, a hub id, a `.gguf` file, or the name of an embedded model."""

import dataclasses
import difflib
import os
import pathlib
from typing import Any

import jax
import transformers

from spotlight_jax.errors import InputError
from spotlight_jax.models import hf
from spotlight_jax.models.config import DecoderConfig, nearest
from spotlight_jax.models.decoder import Params, init_params
from spotlight_jax.models.embedded import EMBEDDED, fetch_embedded
from spotlight_jax.models.gguf_file import open_gguf
from spotlight_jax.models.gguf_model import config_from_gguf, gguf_name, read_gguf_weights
from spotlight_jax.models.on_disk import DiskParams, open_params
from spotlight_jax.models.params import default_dtype, fill_params
from spotlight_jax.models.presets import PRESETS, RANDOM
from spotlight_jax.models.sharding import Placement
from spotlight_jax.models.tokenizer import load_tokenizer, tokenizer_from_gguf


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen decoder with its weights and tokenizer."""

    cfg: DecoderConfig
    """Sizes and switches of the decoder."""
    params: Params
    """Weights, in the tree that `models.decoder` describes."""
    tokenizer: transformers.PreTrainedTokenizerBase
    """Tokenizer of the model's own files."""
    source: str
    """Name of the model, as it was given."""


def load_model(source: str, dtype: Any = None, placement: Placement | None = None) -> BaseModel:
    """Load a model: config, weights and tokenizer.

    Args:
        source: a folder in Hugging Face's layout (safetensors), a hub id `owner/name`, a `.gguf` file, or
            `smollm2-135m`, which is fetched once (`-32k` and `-128k` behind it: with a longer context).
        dtype: of weights and computation; None: bfloat16 on an accelerator, float32 on a CPU.
        placement: where weights lie, such as `models.sharding.weights_on` gives it; None: on the default device.

    Raises:
        InputError: one line that names what is missing, broken or not supported.
    """
    path = _locate(source, weights=True)
    return BaseModel(*_read_weights(source, path, dtype, placement), _read_tokenizer(path), source)


def load_weights(source: str, dtype: Any = None, placement: Placement | None = None) -> tuple[DecoderConfig, Params]:
    """Load config and weights without the tokenizer, for token ids. Args and errors as `load_model`."""
    if source.startswith(RANDOM):
        cfg = _preset(source)
        return cfg, init_params(jax.random.key(0), cfg, default_dtype() if dtype is None else dtype, placement)
    return _read_weights(source, _locate(source, weights=True), dtype, placement)


def open_weights(source: str, dtype: Any = None) -> tuple[DecoderConfig, DiskParams]:
    """Open a model's config, and weights that stay in their files (`models.on_disk`).

    Raises: InputError as `load_model`, and for weights that are in no file.
    """
    if source.startswith(RANDOM):
        raise InputError(f"{source}: random weights are in no file; give a folder or a .gguf file")
    path = _locate(source, weights=True)
    cfg, dtype = _read_config(source, path), default_dtype() if dtype is None else dtype
    if path.is_dir():
        return cfg, open_params(hf.read_hf_weights(path), hf.hf_name, cfg, dtype, str(path))
    return cfg, open_params(read_gguf_weights(open_gguf(path), cfg), gguf_name, cfg, dtype, str(path))


def _preset(source: str) -> DecoderConfig:
    name = source.removeprefix(RANDOM)
    if name not in PRESETS:
        raise InputError(f"{source}: no such shape{nearest(name, tuple(PRESETS))}")
    return PRESETS[name]


def _read_weights(
    source: str, path: pathlib.Path, dtype: Any, placement: Placement | None
) -> tuple[DecoderConfig, Params]:
    cfg = _read_config(source, path)
    if path.is_dir():
        return cfg, fill_params(hf.read_hf_weights(path), hf.hf_name, cfg, dtype, str(path), placement)
    return cfg, fill_params(read_gguf_weights(open_gguf(path), cfg), gguf_name, cfg, dtype, str(path), placement)


def _read_config(source: str, path: pathlib.Path) -> DecoderConfig:
    cfg = hf.load_hf_config(path) if os.path.isdir(path) else config_from_gguf(open_gguf(path))
    return EMBEDDED[source].adapt(cfg) if source in EMBEDDED else cfg


def load_config(source: str) -> DecoderConfig:
    """Load the decoder's config without its weights (a hub model's are not fetched). Raises as `load_model`."""
    if source.startswith(RANDOM):
        return _preset(source)
    return _read_config(source, _locate(source, weights=False))


def open_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer without the weights (a hub model's are not fetched). Raises as `load_model`."""
    if source.startswith(RANDOM):
        raise InputError(f"{source} has no tokenizer; give texts as .npy files of token ids")
    return _read_tokenizer(_locate(source, weights=False))


def _read_tokenizer(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(path) if os.path.isdir(path) else tokenizer_from_gguf(open_gguf(path))


def _locate(source: str, weights: bool) -> pathlib.Path:
    """Return a local folder or GGUF file, fetched first where the source is a name."""
    if source in EMBEDDED:
        return fetch_embedded(source)
    path = pathlib.Path(source).expanduser()
    if os.path.isdir(path):
        return path
    if path.suffix == ".gguf":
        return path
    if os.path.exists(path):
        raise InputError(f"{source}: neither a folder nor a .gguf file")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return hf.fetch_hub(source, weights)
    close = difflib.get_close_matches(source.lower(), list(EMBEDDED), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    names = ", ".join(EMBEDDED)
    raise InputError(
        f"{source}: no such model; {hint}give a folder, a .gguf file, a hub id owner/name, or one of: {names}"
    )
