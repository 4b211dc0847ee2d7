"""Kernels are tried before they are used, also in the middle of a trace."""

import functools

import jax
import jax.numpy as jnp
import pytest

from spotlight_jax.kernels import hash_append, pair_cost, score_select, sparse_attention
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.pair_cost.pallas_triton import pair_sums_pallas_triton
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.sparse_attention.pallas_triton import sparse_attention_pallas_triton
from spotlight_jax.kernels.trust import is_trusted


@pytest.fixture
def gpu(monkeypatch):
    """A device that says it is a GPU; verdicts of before are forgotten, and so are those of the test."""
    is_trusted.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    is_trusted.cache_clear()


def test_nothing_is_tried_without_a_gpu():
    assert not is_trusted("op", lambda: 1 / 0)


def test_a_kernel_is_tried_once_and_while_a_program_is_traced(gpu):
    tried = []

    def check():
        tried.append(bool(jnp.allclose(jax.jit(jnp.sin)(jnp.zeros(3)), 0.0)))
        return tried[-1]

    def program(x):
        return x + 1 if is_trusted("op", check) else x

    assert float(jax.jit(program)(1.0)) == 2 and float(jax.jit(program)(jnp.ones((2,)))[0]) == 2
    assert tried == [True]


@pytest.mark.parametrize("check, words", [(lambda: False, "other results"), (lambda: 1 / 0, "ZeroDivisionError")])
def test_a_kernel_that_fails_is_not_used_and_said(gpu, check, words):
    with pytest.warns(RuntimeWarning, match=words):
        assert not is_trusted("op", check)


def test_a_device_that_cannot_run_the_kernels_takes_xla(gpu):
    """This CPU calls itself a GPU and cannot run any of them."""
    with pytest.warns(RuntimeWarning, match="does not run here"):
        assert not score_select.is_fused(127) and not hash_append.is_fused()
        assert sparse_attention.choose_impl() == "gather" and pair_cost.choose_impl() == "xla"


KERNELS = [
    (score_select, score_select_pallas_triton, lambda: score_select.is_fused(127)),
    (sparse_attention, sparse_attention_pallas_triton, lambda: sparse_attention.choose_impl() == "pallas_triton"),
    (hash_append, hash_append_pallas_triton, lambda: hash_append.is_fused()),
    (pair_cost, pair_sums_pallas_triton, lambda: pair_cost.choose_impl() == "pallas_triton"),
]


@pytest.mark.parametrize("op, kernel, is_taken", KERNELS, ids=[kernel.__name__ for _, kernel, _ in KERNELS])
def test_every_kernel_passes_its_check_while_a_program_is_traced(gpu, monkeypatch, op, kernel, is_taken):
    """On the interpreter."""
    monkeypatch.setattr(op, kernel.__name__, functools.partial(kernel, interpret=True))

    def program(x):
        return x + 1 if is_taken() else x

    assert float(jax.jit(program)(1.0)) == 2


@pytest.mark.gpu
def test_every_kernel_passes_its_check_on_a_gpu():
    assert score_select.is_fused(127) and hash_append.is_fused()
    assert sparse_attention.choose_impl() == pair_cost.choose_impl() == "pallas_triton"
