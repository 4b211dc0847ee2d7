"""Scores of cached tokens from a selector's file, with NumPy alone: a start for other engines that take our selectors.

    python examples/numpy_reader.py runs/demo/selector

docs/selector-format.md says what each array is. Heads are those of one layer; keys and queries are after RoPE.
"""

import json
import pathlib
import sys

import numpy as np

DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U32": np.uint32}


def read_safetensors(path):
    """Read arrays by name: 8 bytes of length, a JSON header of dtypes, shapes and places, then the arrays' bytes."""
    raw = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = {name: entry for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"}
    return {
        name: np.frombuffer(raw[start:][slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_layer(folder, layer, length):
    """Return one layer's arrays, of the hash functions that serve sequences of `length` tokens at their end."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    assert config["format"] == 2 and config["hash"]["form"] == "transform", "see docs/selector-format.md"
    prefix = next((f"up_to_{most}." for most in config.get("shorter", []) if length <= most), "")
    arrays = read_safetensors(pathlib.Path(folder) / "selector.safetensors")
    names = ("stats.mean", "stats.axes", "stats.cells", "stats.members", "weights.decode", "weights.log_gain")
    return {name.partition(".")[2]: arrays[prefix + name][layer] for name in names}


def key_bits(arrays, keys):
    """Return the bits [kv_len, kv_heads, code_bits] of keys [kv_len, kv_heads, head_dim], which a cache keeps."""
    coordinate = np.einsum("skd,kdc->skc", keys - arrays["mean"], arrays["axes"]) + np.float32(0.5)
    levels = arrays["cells"]
    place = levels * np.clip(coordinate, 0.5 / levels, 1 - 0.5 / levels)
    return (np.ceil(place) - 1) % 2 == 1


def bit_weights(arrays, queries):
    """Return integer weights [kv_heads, score_heads, code_bits] of bits, of a token's queries [q_heads, head_dim]."""
    grouped = queries.reshape(arrays["mean"].shape[0], -1, queries.shape[-1])
    weights = np.einsum("kgd,kdc->kgc", grouped, arrays["decode"])
    weights = weights * np.exp(arrays["log_gain"]).reshape(*weights.shape[:2], 1)
    sums = np.einsum("kgc,krg->krc", weights, arrays["members"])
    sums = sums * (4 / np.sqrt(np.square(sums).sum(-1, keepdims=True) + np.float32(1e-12)))
    sizes, room = np.abs(sums), 1020 - sums.shape[-1] // 2
    largest, total = sizes.max((-2, -1), keepdims=True), sizes.sum(-1, keepdims=True).max(-2, keepdims=True)
    return np.round(sums * np.minimum(127 / largest, room / total)).astype(np.int32)


def scores(arrays, queries, bits):
    """Return scores [kv_heads, kv_len] of cached tokens; a query reads the highest, and of equals the newest."""
    weights = bit_weights(arrays, queries)
    sums = np.einsum("krc,skc->krs", weights, bits.astype(np.int32)) - (weights.sum(-1) >> 1)[:, :, None]
    return sums.max(axis=1)


if __name__ == "__main__":
    arrays, random = read_layer(sys.argv[1], layer=2, length=8192), np.random.default_rng(0)
    kv_heads, head_dim = arrays["mean"].shape
    group = arrays["members"].shape[-1]
    keys = arrays["mean"] + random.normal(0, 1, (1000, kv_heads, head_dim)).astype(np.float32)
    queries = random.normal(0, 1, (kv_heads * group, head_dim)).astype(np.float32)
    found = scores(arrays, queries, key_bits(arrays, keys))
    exact = np.einsum("kgd,skd->ks", queries.reshape(kv_heads, group, head_dim), keys)
    for head in range(kv_heads):
        chosen, best = (set(np.argsort(row)[-50:]) for row in (found[head], exact[head]))
        print(f"KV head {head}: {len(chosen & best)} of the 50 highest of 1,000 random keys are found (by chance 2.5)")
