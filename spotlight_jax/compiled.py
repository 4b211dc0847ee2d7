"""Compiled programs: under XLA's options, and kept in the user's cache folder, where they outlive the process."""

import os
from pathlib import Path
from typing import Any

import jax

from spotlight_jax.errors import InputError
from spotlight_jax.texts import cache_dir

LEAST_SECONDS = 0.5  # that a program took to compile, to be kept


def use_compile_cache() -> Path:
    """Keep compiled programs in the user's cache folder, so that the next start does not wait for them.

    Every command begins here. Raises: InputError where JAX has no device of the platform that it was told to use.
    """
    check_device()
    folder = cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def check_device() -> None:
    """Raise InputError where JAX finds no device, which it reports in several ways."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        told = f" for JAX_PLATFORMS={wanted}" if wanted else ""
        reason = (str(error).strip().splitlines() or ["the plugin found no device"])[0]
        raise InputError(
            f"JAX finds no device{told} ({reason}); unset JAX_PLATFORMS, or install the extra for it "
            "(pip install 'spotlight-jax[cuda12]'), then `spotlight doctor`"
        ) from None


def compile_with(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> jax.stages.Compiled:
    """Compile under XLA's options, or without any where this version of XLA does not know one of them."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if options is None or "No such compile option" not in str(error):
            raise
        return lowered.compile()
