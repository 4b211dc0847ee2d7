"""What this machine and installation have, and what each op uses here."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich.console import Console

from spotlight_jax.cache import bucket_length
from spotlight_jax.commands.doctor import DoctorConfig
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import GPU_CHUNK
from spotlight_jax.kernels import hash_append, match_score, pair_cost, score_select, select_top, sparse_attention
from spotlight_jax.memory import GIB, available_bytes, plan_memory
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.load import load_config
from spotlight_jax.models.sharding import config_of_device, meshes_of
from spotlight_jax.selector.selection import CROSSOVER
from spotlight_jax.weights import real_bounds

PACKAGES = ("spotlight-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Return the installed versions of what matters."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def implementations() -> list[tuple[str, str, str]]:
    """List each op, what `auto` uses for it here, and why."""
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


def describe_links() -> list[str]:
    """Return how the GPUs of this machine are linked, as NVIDIA's tool says; nothing where there is none to ask."""
    if len(jax.devices()) < 2 or jax.default_backend() != "gpu" or shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False, timeout=30)
    rows = [line for line in done.stdout.splitlines() if line.lstrip().startswith("GPU")]
    return [line.rstrip().expandtabs(6) for line in rows] if done.returncode == 0 else []


def describe_needs(cfg: DoctorConfig, model_cfg: DecoderConfig) -> Iterator[str]:
    """Yield what a device of each mesh holds that the model's heads can be split over, in GiB."""
    for sizes in meshes_of(model_cfg):
        plan = plan_memory(
            config_of_device(model_cfg, sizes),
            jnp.dtype(cfg.dtype),
            cfg.sequences,
            bucket_length(cfg.tokens),
            GPU_CHUNK,
            TransformConfig(),
            SelectionConfig(),
            has_tail=True,
        )
        yield f"--mesh model={sizes['model']}: {plan.describe()}"


def main(cfg: DoctorConfig) -> None:
    """Print what was found; raises InputError where there is no device, or no such model."""
    console = Console(highlight=False)
    model_cfg = None if cfg.model is None else load_config(cfg.model)
    console.rule("versions")
    for name, version in versions().items():
        console.print(f"{name:20} {version}", markup=False)
    folder = use_compile_cache()  # refuses a machine without the device that JAX was told to use
    console.rule("device")
    for device in jax.devices():
        free = available_bytes(device)
        memory = "memory unknown" if free is None else f"{free / GIB:.1f} GiB free"
        console.print(f"{device.platform} {device.id}: {device.device_kind}, {memory}", markup=False)
    for line in describe_links():
        console.print(line, markup=False)
    if model_cfg is not None:
        console.rule(f"{cfg.model}: {cfg.sequences} x {cfg.tokens:,} tokens, {cfg.dtype}, on each device")
        for line in describe_needs(cfg, model_cfg):
            console.print(line, markup=False, soft_wrap=True)
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
