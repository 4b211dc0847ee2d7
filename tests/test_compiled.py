"""Compiling under options that this version of XLA may not have."""

import jax
import jax.numpy as jnp
import pytest

from spotlight_jax.compiled import compile_with
from spotlight_jax.engine import MERGED_PRODUCTS


@pytest.mark.parametrize("options", [None, MERGED_PRODUCTS, {"xla_gpu_no_such_thing": 1}])
def test_a_program_runs_whether_its_options_exist_or_not(options):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    assert compile_with(lowered, options)(jnp.ones(3)).tolist() == [2, 2, 2]


def test_other_faults_of_a_compilation_are_told():
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_embed_ir_in_executable"):
        compile_with(lowered, {"xla_embed_ir_in_executable": "neither yes nor no"})


def test_this_version_has_the_option_that_merges_products():
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=MERGED_PRODUCTS)
