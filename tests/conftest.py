"""What every test runs under: shapes checked at run time, no silent broadcasting, compiled programs kept."""

from jaxtyping import install_import_hook

# Before anything of ours is imported: jaxtyping's annotations are then checked with beartype at each call.
install_import_hook(["spotlight_jax", "train", "eval"], "beartype.beartype")

import functools
import gc
import signal
from pathlib import Path

import hypothesis
import jax
import pytest

from spotlight_jax import texts

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled test programs outlive the run, which makes the next one faster.
jax.config.update("jax_compilation_cache_dir", str(texts.cache_dir() / "compiled-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# A shell begins what it runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two busy cores make any deadline flaky; the same examples every time make a failure everybody's.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("default")


# Each compiled program of XLA's CPU client maps memory, and Linux allows 65,530 maps a process: one more crashes it.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 25_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps(request):
    """After a module, forgets the compiled programs when they have become many, and the engines that hold some."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        for value in vars(request.module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPOTLIGHT_CACHE", str(folder))
    return folder
