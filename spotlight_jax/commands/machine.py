"""What this machine and installation have, and what each op uses here."""

import importlib.metadata
import platform

import jax
import jax.numpy as jnp
from rich.console import Console

from spotlight_jax.commands.doctor import DoctorConfig
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.kernels import hash_append, match_score, pair_cost, score_select, select_top, sparse_attention
from spotlight_jax.memory import GIB, available_bytes
from spotlight_jax.selector.selection import CROSSOVER
from spotlight_jax.weights import real_bounds

PACKAGES = ("spotlight-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what matters."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def implementations() -> list[tuple[str, str, str]]:
    """Op, what `auto` uses for it here, and why."""
    is_cpu = jax.default_backend() == "cpu"
    fused = ("XLA, block by block", "cuDNN needs an NVIDIA GPU") if is_cpu else ("cuDNN", "16-bit floats on a GPU")

    def kernel(impl: str) -> tuple[str, str]:
        if impl == "pallas_triton":
            return "Pallas-Triton", "tried here: gives what its reference gives"
        return "XLA", "kernels need an NVIDIA GPU" if is_cpu else "the kernel failed its check here, see the warning"

    return [
        ("prefill attention", *fused),
        ("dense decoding", "XLA" if is_cpu else "cuDNN", fused[1]),
        ("hash_append", *kernel(hash_append.choose_impl())),
        ("score_select", *kernel(score_select.choose_impl(real_bounds(TransformConfig().code_bits)))),
        ("sparse_attention", *kernel(sparse_attention.choose_impl())),
        ("estimated_attention", *kernel(sparse_attention.choose_estimated_impl())),
        ("select_top", f"XLA, {select_top.choose_impl()}", "the cut is found by counting"),
        ("match_score", f"XLA, {match_score.choose_impl(64)}", "many queries: codes are unpacked once"),
        ("pair_cost", *kernel(pair_cost.choose_impl())),
    ]


def main(cfg: DoctorConfig) -> None:
    """Print what was found; raises InputError where there is no device."""
    console = Console(highlight=False)
    console.rule("versions")
    for name, version in versions().items():
        console.print(f"{name:20} {version}", markup=False)
    folder = use_compile_cache()  # refuses a machine without the device that JAX was told to use
    console.rule("device")
    for device in jax.devices():
        free = available_bytes(device)
        memory = "memory unknown" if free is None else f"{free / GIB:.1f} GiB free"
        console.print(f"{device.platform} {device.id}: {device.device_kind}, {memory}", markup=False)
    if cfg.run:
        product = jnp.ones((64, 64)) @ jnp.ones((64, 64))
        works = "works" if float(product[0, 0]) == 64 else "gives WRONG results"
        console.print(f"a small product {works}", markup=False)
    console.rule("what each op uses")
    for op, used, why in implementations():
        console.print(f"{op:20} {used} ({why})", markup=False)
    tokens = CROSSOVER.get(jax.default_backend(), CROSSOVER["gpu"])
    console.print(f"{'sparse reading':20} from {tokens:,} tokens x batch (--min-context auto)", markup=False)
    console.rule("folders")
    console.print(f"compiled programs    {folder}", markup=False, soft_wrap=True)
    console.print(f"texts and models     {folder.parent}", markup=False, soft_wrap=True)
