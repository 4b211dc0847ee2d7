"""Compiled programs: under XLA's options, and kept in the user's cache folder, where they outlive the process."""

from pathlib import Path
from typing import Any

import jax

from spotlight_jax.texts import cache_dir


def use_compile_cache() -> Path:
    """Keep compiled programs in the user's cache folder, so that the next start does not wait for them."""
    folder = cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def compile_with(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> jax.stages.Compiled:
    """The program under XLA's options; without them where this version has one of them no more."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if options is None or "No such compile option" not in str(error):
            raise
        return lowered.compile()
