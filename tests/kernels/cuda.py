"""Lowering for a GPU on a machine that has none: what a kernel cannot express fails here already."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-40GB", num_cores=108, platform="gpu")


def lower_for_cuda(function, *args) -> str:
    """The lowered program of `function` for these shapes, as text."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=A100)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
