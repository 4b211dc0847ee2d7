"""Long-context LLM decoding that reads only the cached tokens that matter, in JAX.

    from spotlight_jax import generate, load_model, load_selector

    model = load_model("smollm2-135m")
    selector = load_selector("runs/demo")
    print(generate(model, ["Once upon a time"], selector=selector)[0].text)

The names below are the public API: what else the package holds is internal and may change in any version. Each name is
imported when it is first used, so that `import spotlight_jax` imports no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotlight_jax.config.data import DataConfig
    from spotlight_jax.config.generation import GenerateConfig
    from spotlight_jax.config.hashing import HashConfig, NetworkConfig, TransformConfig
    from spotlight_jax.config.sampling import SamplingConfig
    from spotlight_jax.config.selection import SelectionConfig
    from spotlight_jax.engine import Engine
    from spotlight_jax.errors import InputError
    from spotlight_jax.generation import Generation, generate, make_engine, stream
    from spotlight_jax.models.load import BaseModel, load_model
    from spotlight_jax.selector.checkpoint import Selector, load_selector, save_selector
    from train.api import fit, train
    from train.config import LayerwiseConfig

_MODULES = {
    "BaseModel": "spotlight_jax.models.load",
    "DataConfig": "spotlight_jax.config.data",
    "Engine": "spotlight_jax.engine",
    "GenerateConfig": "spotlight_jax.config.generation",
    "Generation": "spotlight_jax.generation",
    "HashConfig": "spotlight_jax.config.hashing",
    "InputError": "spotlight_jax.errors",
    "LayerwiseConfig": "train.config",
    "NetworkConfig": "spotlight_jax.config.hashing",
    "SamplingConfig": "spotlight_jax.config.sampling",
    "SelectionConfig": "spotlight_jax.config.selection",
    "Selector": "spotlight_jax.selector.checkpoint",
    "TransformConfig": "spotlight_jax.config.hashing",
    "fit": "train.api",
    "generate": "spotlight_jax.generation",
    "load_model": "spotlight_jax.models.load",
    "load_selector": "spotlight_jax.selector.checkpoint",
    "make_engine": "spotlight_jax.generation",
    "save_selector": "spotlight_jax.selector.checkpoint",
    "stream": "spotlight_jax.generation",
    "train": "train.api",
}

__all__ = [
    "BaseModel",
    "DataConfig",
    "Engine",
    "GenerateConfig",
    "Generation",
    "HashConfig",
    "InputError",
    "LayerwiseConfig",
    "NetworkConfig",
    "SamplingConfig",
    "SelectionConfig",
    "Selector",
    "TransformConfig",
    "fit",
    "generate",
    "load_model",
    "load_selector",
    "make_engine",
    "save_selector",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'spotlight_jax' has no attribute '{name}'")
    # by name: the package imports nothing of `train` before it is asked to train
    import_own = importlib.import_module("spotlight_jax.cli").import_own
    value = getattr(import_own(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
