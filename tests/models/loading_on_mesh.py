"""Weights read slice by slice onto a mesh of virtual devices; `test_sharding` runs this in a process of its own."""

import json
import pathlib
import tempfile
import threading
import time
import tracemalloc

import jax
import numpy as np
import safetensors.numpy

from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.hf import hf_name
from spotlight_jax.models.load import load_weights
from spotlight_jax.models.sharding import open_mesh, shardings_of, weights_on
from tests.models import tiny
from tests.models.tiny_gguf import write_gguf

CONFIG = tiny._LLAMA | {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 16384, "num_hidden_layers": 4,
}  # fmt: skip


def write_random(folder: pathlib.Path, config: dict, dtype: str = "float32") -> int:
    """Write a random model with a layer a file; returns the bytes of one layer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    cfg = tiny.config_from_hf(config)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg, dtype))
    rng, files, layer_bytes = np.random.default_rng(0), {}, 0
    for part, tree in shapes.items():
        tensors = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = (part, *(entry.key for entry in path))
            shape = leaf.shape[::-1] if keys[-1] == "kernel" else leaf.shape
            tensors[hf_name(keys)] = rng.standard_normal(shape, np.float32).astype(leaf.dtype)
        safetensors.numpy.save_file(tensors, folder / f"{part}.safetensors")
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
        if part == "layer_0":
            layer_bytes = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return layer_bytes


def compare(source: pathlib.Path, sizes: dict[str, int]) -> None:
    """What each device holds of a model is what one device holds there, and lies where the table says."""
    cfg, whole = load_weights(str(source))
    mesh = open_mesh(sizes, cfg)
    _, spread = load_weights(str(source), placement=weights_on(mesh))
    assert jax.tree.structure(whole) == jax.tree.structure(spread)
    leaves = zip(jax.tree.leaves(spread), jax.tree.leaves(whole), shardings_of(whole, mesh), strict=True)
    for ours, theirs, place in leaves:
        assert ours.sharding == place
        np.testing.assert_array_equal(ours, theirs)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load_measured(folder: pathlib.Path, layer_bytes: int, sizes: dict[str, int], dtype: str = "float32") -> float:
    """Load onto a mesh; returns the most memory of the host beyond what lies on devices, in layers."""
    cfg = tiny.config_from_hf(json.loads((folder / "config.json").read_text()))
    mesh = open_mesh(sizes, cfg)
    before, seen, is_over = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            seen[0] = max(seen[0], anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    tracemalloc.start()
    _, params = load_weights(str(folder), np.dtype(dtype), weights_on(mesh))
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    is_over.set()
    thread.join()
    placed = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    resident = seen[0] - before - placed
    print(f"traced {(peak - left) / layer_bytes:.2f} layers, resident {resident / layer_bytes:.2f}, placed {placed:,}")
    return (peak - left) / layer_bytes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for case, sizes in (("llama_biases", {"model": 2}), ("smollm2", {"data": 2, "model": 1})):
            tiny.write_folder(folder / case, tiny.CASES[case], shards=2)
            compare(folder / case, sizes)
            compare(write_gguf(folder / f"{case}.gguf", tiny.CASES[case]), sizes)
        large = folder / "large"
        layer_bytes = write_random(large, CONFIG)
        table = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 4
        assert table > 2 * layer_bytes, "a table that is read whole must be seen"
        layers = load_measured(large, layer_bytes, {"model": 4})
        assert layers < 2, layers
        print("equal")
