"""Where arrays lie on a mesh, and that generation on one gives what a single device gives."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.sharding import check_mesh, smallest_fit, weight_axes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("modle=2",), "no axis 'modle'"),
        (("model=2", "model=3"), "twice"),
        (("model",), "no number of devices"),
        (("model=0",), "no number of devices"),
        (("data=2,model=-1",), "no number of devices"),
    ],
)
def test_a_mesh_that_is_none_is_refused(given, told):
    with pytest.raises(InputError, match=told):
        parse_mesh(given)


def test_axes_may_be_given_in_one_word_or_several():
    assert parse_mesh(("data=2,model=3",)) == parse_mesh(("data=2", "model=3")) == {"data": 2, "model": 3}
    assert parse_mesh(()) == {}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"model": 16}, "16 devices, and there are 8"),
        ({"model": 3}, "does not divide the model's 4 KV heads; give model=1 or model=2 or model=4$"),
        ({"model": 8}, "does not divide the model's 4 KV heads; give model=4 context=2$"),
        ({"context": 3}, "a power of two of devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, told):
    with pytest.raises(InputError, match=told):
        check_mesh(sizes, PRESETS["qwen2.5-7b"], 8)


@pytest.mark.parametrize(
    ("sizes", "rest", "told"),
    [
        ({"model": 16}, "context", "model=4 context=4"),
        ({"data": 2, "model": 8, "context": 2}, "context", "data=2 model=4 context=4"),
        ({"data": 2, "model": 12}, "data", "data=6 model=4"),
    ],
)
def test_heads_that_are_fewer_than_devices_are_split_further(sizes, rest, told):
    """As many devices as were asked for; a mesh that is told is one that can be had."""
    with pytest.raises(InputError, match=f"; give {told}$"):
        check_mesh(sizes, PRESETS["qwen2.5-7b"], 64, rest)
    check_mesh(parse_mesh((told.replace(" ", ","),)), PRESETS["qwen2.5-7b"], 64)


@pytest.mark.parametrize(
    ("devices", "needed", "expected"),
    [
        (8, 1, {}),
        (8, 3, {"model": 4}),
        (8, 8, {"model": 4, "context": 2}),
        (16, 9, {"model": 4, "context": 4}),
        (8, 9, {}),  # nothing fits, which the plan of one device then says
        (2, 2, {"model": 2}),
        (3, 4, {}),
    ],
)
def test_what_fits_is_the_mesh_of_the_fewest_devices(devices, needed, expected):
    """Heads first, and tokens where there are more devices than the model's four KV heads."""
    cfg = PRESETS["qwen2.5-7b"]
    assert smallest_fit(cfg, devices, lambda sizes: math.prod(sizes.values()) >= needed) == expected


def test_every_weight_of_a_model_with_all_switches_has_axes_of_its_size():
    """Split axes have the size of what they are named for, so that a device holds whole heads."""
    cfg = DecoderConfig(
        vocab=96, embed=20, layers=1, q_heads=6, kv_heads=2, head_dim=4, mlp=28, max_len=8,
        qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True,
    )  # fmt: skip
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(cfg, "float32")):
        keys = tuple(entry.key for entry in path)
        axes = weight_axes(keys)
        assert len(axes) == len(leaf.shape), keys
        sizes = {"vocab": {96}, "heads": {24, 8}, "mlp": {28}}
        for axis, size in zip(axes, leaf.shape, strict=True):
            assert axis is None or size in sizes[axis], (keys, axis)
        # everything that is large is split: all matrices
        assert len(leaf.shape) == 1 or axes.count(None) == 1, keys
        seen |= set(axes)
    assert seen == {None, "vocab", "heads", "mlp"}


def run_on_virtual_devices(module: str, *args: str) -> str:
    """What a module of tests prints in a process of its own: JAX makes its eight virtual devices as it starts."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *args],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 7))])
def test_generation_on_a_mesh_gives_what_one_device_gives(case):
    assert "equal" in run_on_virtual_devices("models.on_meshes", str(case))


def test_each_device_reads_its_own_slices_and_the_host_holds_less_than_two_layers():
    assert "equal" in run_on_virtual_devices("models.loading_on_mesh")


def test_a_cache_split_by_tokens_gives_the_selection_and_the_output_of_one_device():
    assert "equal" in run_on_virtual_devices("models.context_on_mesh")
