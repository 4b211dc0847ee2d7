"""The Triton backend of Pallas is deprecated: without it everything imports, and decodes by plain XLA."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "spotlight_jax"

DECODE = """
import importlib, sys
sys.modules["jax.experimental.pallas.triton"] = None  # whoever imports it fails
for name in sys.argv[1:]:
    importlib.import_module(name)
import warnings
import jax
import numpy as np
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.engine import DecodeConfig, Engine
from spotlight_jax.generation import head_shape
from spotlight_jax.kernels import hash_append, trust
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.selection import SelectionConfig
model = PRESETS["tiny"]
cfg = TransformConfig(code_bits=32)
selector = Selector(head_shape(model), init_functions(jax.random.key(1), cfg, head_shape(model)), "tiny", {})
sparse = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))
cfg = DecodeConfig(prefill_chunk=16, selection=sparse)
engine = Engine(model, init_params(jax.random.key(0), model), selector, cfg)
state = engine.prefill([[1, 2, 3] * 10, [4, 5]], 4)
state, tokens = engine.decode(state)
print("decoded", np.asarray(tokens).shape[0])
# a GPU without it takes plain XLA too, and is told
jax.default_backend = lambda: "gpu"
trust.is_trusted.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print("takes", hash_append.choose_impl())
print(next(str(one.message) for one in said if one.category is RuntimeWarning))
"""


@pytest.mark.slow
def test_without_pallas_triton_everything_imports_and_decodes_by_plain_xla():
    files = [file.relative_to(ROOT).with_suffix("") for file in PACKAGE.rglob("*.py") if file.stem != "__main__"]
    modules = sorted(".".join(file.parts).removesuffix(".__init__") for file in files)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, *modules], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "decoded 2" in done.stdout and "takes reference" in done.stdout
    assert "hash_append does not run here" in done.stdout
