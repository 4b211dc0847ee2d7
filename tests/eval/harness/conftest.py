"""The tiny model that all tests of the harness ask."""

import jax
import jax.numpy as jnp
import pytest

from eval.model.load import EvalModel
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.forms import init_functions
from tests.byte_tokenizer import byte_tokenizer
from tests.eval.harness.tiny import MODEL


@pytest.fixture(scope="session")
def model():
    cfg = TransformConfig(code_bits=64)
    shape = head_shape(MODEL)
    selector = Selector(shape, init_functions(jax.random.key(1), cfg, shape), "tiny", {})
    params = init_params(jax.random.key(0), MODEL, jnp.float32)
    return EvalModel(MODEL, params, byte_tokenizer(), selector, "tiny")
