"""Compiled programs outlive the process, in the user's cache folder."""

from pathlib import Path

import jax

from spotlight_jax.texts import cache_dir


def use_compile_cache() -> Path:
    """Keep compiled programs in the user's cache folder, so that the next start does not wait for them."""
    folder = cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
