"""Training with the frozen model split over a mesh: what is refused, and what each device holds and gives."""

import pytest

from spotlight_jax.errors import InputError
from tests.models.test_sharding import run_on_virtual_devices
from train.config import LayerwiseConfig
from train.estimate import plan_run


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mesh": ("modle=2",)}, "no axis 'modle'"),
        ({"mesh": ("context=2",)}, "train with axes model and data"),
        ({"mesh": ("model=2",), "weights": "disk"}, "leave out --weights disk, or --mesh"),
        ({"mesh": ("model=2",), "cache_dir": "states"}, "leave out --mesh, or it"),
    ],
)
def test_a_mesh_that_no_run_can_have_is_refused(fields, told):
    with pytest.raises(InputError, match=told):
        LayerwiseConfig(**fields)


@pytest.mark.parametrize(
    ("axes", "told"), [("model=2", "is 2 devices, and there are 1"), ("model=1", "is a single device; leave it out")]
)
def test_a_mesh_that_this_machine_does_not_have_is_refused(axes, told):
    with pytest.raises(InputError, match=told):
        plan_run(LayerwiseConfig(model="random:smollm2-135m", mesh=(axes,)))


def test_a_model_that_is_split_gives_the_queries_and_keys_of_one_device():
    assert "equal: ('data=2', 'model=2')" in run_on_virtual_devices("train.split_on_mesh")
