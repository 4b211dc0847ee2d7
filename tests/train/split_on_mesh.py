"""The frozen model split over virtual devices against one device; `test_split` runs this in a process of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.config.data import DataConfig
from spotlight_jax.models.sharding import mesh_of
from train.capture import capture, make_mesh
from train.config import LayerwiseConfig
from train.data import _load_params
from train.estimate import estimate_memory, plan_run

WINDOW, AT_ONCE = 256, 2
CONFIG = LayerwiseConfig(model="random:tiny", data=DataConfig(window=WINDOW))


def compare(mesh: tuple[str, ...], devices: int) -> None:
    """All layers' queries and keys are those of one device, and a device holds what the dry run says."""
    plan = plan_run(dataclasses.replace(CONFIG, mesh=mesh))
    params = _load_params(plan)
    assert mesh_of(params) == plan.split and plan.mesh.size == devices
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert estimate_memory(plan)["frozen model's share"] == own
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, plan.model.vocab, (AT_ONCE, WINDOW)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(WINDOW, dtype=jnp.int32), (1, AT_ONCE, WINDOW))
    picks = jnp.asarray(np.sort(rng.permuted(np.tile(np.arange(WINDOW), (AT_ONCE, 1)), axis=1)[:, :9]), jnp.int32)
    found = capture(params, tokens, positions, picks, plan.model, plan.forward_mesh)
    assert len(found.keys.sharding.device_set) == devices
    alone = jax.device_put(jax.device_get(params), jax.devices()[0])
    mesh_of_one = make_mesh(jax.make_mesh((1, 1, 1), ("data", "model", "context"), devices=jax.devices()[:1]))
    expected = capture(alone, tokens, positions, picks, plan.model, mesh_of_one)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours[: plan.model.layers], theirs, atol=1e-5)
    print("equal:", mesh)


if __name__ == "__main__":
    compare(("model=2",), 2)
    compare(("data=2", "model=2"), 4)
