"""A server on a mesh of devices: what is refused, and that requests get what they get on one device."""

import jax
import pytest
from rich.console import Console

from spotlight_jax.commands.serve import ServeConfig
from spotlight_jax.errors import InputError
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.serve.run import load_slots
from tests.models.test_sharding import run_on_virtual_devices


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mesh": ("modle=2",)}, "no axis 'modle'"),
        ({"mesh": ("data=3",)}, "--mesh data=3 does not divide 8 slots; give --slots 9"),
        ({"mesh": ("data=2",), "prefix_tokens": 64}, "--mesh data=2 keeps no beginnings of prompts"),
        ({"mesh": ("context=2",), "prefix_tokens": 64}, "leave --prefix-tokens out"),
    ],
)
def test_a_mesh_that_cannot_serve_is_refused(fields, told):
    with pytest.raises(InputError, match=told):
        ServeConfig(**fields)


def test_a_mesh_of_more_devices_than_there_are_is_refused_before_weights_are_read():
    cfg = ServeConfig(mesh=("model=2",))
    assert len(jax.devices()) == 1
    with pytest.raises(InputError, match="--mesh model=2 is 2 devices, and there are 1"):
        load_slots(cfg, "no such model", PRESETS["tiny"], None, Console(stderr=True))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "axes", ["model=2", *(pytest.param(axes, marks=slow) for axes in ("data=2,model=2", "context=2"))]
)
def test_requests_at_once_on_a_mesh_get_what_they_get_on_one_device(axes):
    assert "equal" in run_on_virtual_devices("serve.on_meshes", axes)
