"""What every test runs under: shapes checked at run time, no silent broadcasting, compiled programs kept."""

import os

# Before JAX is imported, and for the processes that tests start: compiled programs outlive the run, which makes the
# next one faster, and none carries the Python stack of each of its operations, which takes long to write down.
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}

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

from spotlight_jax import compiled, texts

jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(texts.cache_dir() / "compiled-tests")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
compiled.LEAST_SECONDS = 0.3  # of the commands that tests run in this process

# A shell begins what it runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two busy cores make any deadline flaky; the same examples every time make a failure everybody's.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("default")


# Each compiled program of XLA's CPU client maps memory, and Linux allows 65,530 maps a process: one more crashes it.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 25_000


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


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
