"""Targets of a base model and a selector: configs, weights, tokenizers, GGUF files, selector folders."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.generation import encode_prompts
from spotlight_jax.models import hf
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.models.gguf_file import open_gguf
from spotlight_jax.models.gguf_model import config_from_gguf, gguf_name, read_gguf_weights
from spotlight_jax.models.params import fill_params
from spotlight_jax.models.rope import rope_frequencies
from spotlight_jax.models.tokenizer import load_tokenizer, tokenizer_from_gguf
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, load_selector, save_selector
from spotlight_jax.selector.forms import init_functions
from tests.fuzz.damage import damage_bytes, damage_json, json_bytes
from tests.fuzz.target import Target
from tests.models import tiny
from tests.models.tiny_gguf import write_gguf

_MODEL = tiny.CASES["smollm2"] | {"vocab_size": 320}  # rows for all of the tokenizer's ids
_SHAPE = HeadShape(layers=2, q_heads=4, kv_heads=2, head_dim=16)
TEXT = "hello world <|im_end|> 12345 na\u00efve \U0001f642"


@functools.cache
def _sound() -> dict[str, bytes]:
    """Sound files of every kind, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny.write_folder(folder / "model", _MODEL, shards=1)
        tokenizer_from_gguf(open_gguf(write_gguf(folder / "model.gguf", _MODEL))).save_pretrained(folder / "model")
        cfg = TransformConfig(code_bits=32)
        params = init_functions(jax.random.key(0), cfg, _SHAPE)
        save_selector(folder / "selector", Selector(_SHAPE, params, "owner/model", {"steps": 3}), "card")
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and "orbax" not in file.parts
        }


def _write(folder: Path, names: list[str], changed: dict[str, bytes]) -> Path:
    for name in names:
        file = folder / Path(name).name
        file.write_bytes(changed.get(name, _sound()[name]))
    return folder


def _write_config(rng: np.random.Generator, folder: Path) -> Path:
    case = tiny.CASES[list(tiny.CASES)[rng.integers(0, len(tiny.CASES))]]
    (folder / "config.json").write_bytes(json_bytes(rng, case))
    return folder


def _read_config(folder: Path) -> None:
    cfg = hf.load_hf_config(folder)
    param_shapes(cfg, jnp.float32)
    if cfg.rope.kind != "dynamic":
        rope_frequencies(cfg.head_dim, cfg.rope)


def _write_gguf(rng: np.random.Generator, folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(damage_bytes(rng, _sound()["model.gguf"]))
    return path


def _read_gguf(path: Path) -> None:
    file = open_gguf(path)
    cfg = config_from_gguf(file)
    encode_prompts(tokenizer_from_gguf(file), [TEXT], 1, cfg)
    fill_params(read_gguf_weights(file, cfg), gguf_name, cfg, None, str(path))


def _write_safetensors(rng: np.random.Generator, folder: Path) -> Path:
    names = ["model/config.json", "model/model.safetensors"]
    return _write(folder, names, {names[1]: _damage_safetensors(rng, _sound()[names[1]])})


def _damage_safetensors(rng: np.random.Generator, data: bytes) -> bytes:
    """Damaged bytes, or a header that says other names, types, shapes and places."""
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(damage_json(rng, json.loads(data[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _read_safetensors(folder: Path) -> None:
    cfg = hf.load_hf_config(folder)
    fill_params(hf.read_hf_weights(folder), hf.hf_name, cfg, None, str(folder))


def _write_tokenizer(rng: np.random.Generator, folder: Path) -> Path:
    names = [name for name in _sound() if Path(name).parent == Path("model") and "safetensors" not in name]
    changed = {}
    for name in rng.choice([name for name in names if name.endswith(".json")], size=1):
        changed[name] = json_bytes(rng, json.loads(_sound()[name]))
    return _write(folder, names, changed)


def _read_tokenizer(folder: Path) -> None:
    cfg = hf.load_hf_config(folder)
    tokenizer = load_tokenizer(folder)
    (tokens,) = encode_prompts(tokenizer, [TEXT], 1, cfg)
    tokenizer.decode(tokens, skip_special_tokens=True)


def _write_selector(rng: np.random.Generator, folder: Path) -> Path:
    config, arrays = "selector/config.json", "selector/selector.safetensors"
    if rng.random() < 0.5:
        return _write(folder, [config, arrays], {config: json_bytes(rng, json.loads(_sound()[config]))})
    return _write(folder, [config, arrays], {arrays: _damage_safetensors(rng, _sound()[arrays])})


def _read_selector(folder: Path) -> None:
    selector = load_selector(folder, _SHAPE)
    assert isinstance(selector.base_model, str)
    for leaf in jax.tree.leaves(selector.params):
        assert leaf.dtype == jnp.float32 or jnp.issubdtype(leaf.dtype, jnp.integer), leaf.dtype
        assert np.isfinite(np.asarray(leaf)).all(), "a loaded selector has values that are not finite"


TARGETS = {
    "config": Target(_write_config, _read_config),
    "gguf": Target(_write_gguf, _read_gguf),
    "safetensors": Target(_write_safetensors, _read_safetensors),
    "tokenizer": Target(_write_tokenizer, _read_tokenizer),
    "selector": Target(_write_selector, _read_selector),
}
