"""Kernels are tried before they are used, also in the middle of a trace."""

import functools

import jax
import jax.numpy as jnp
import pytest

from spotlight_jax.kernels import hash_append, pair_cost, score_select, sparse_attention
from spotlight_jax.kernels.hash_append.pallas_triton import hash_append_pallas_triton
from spotlight_jax.kernels.pair_cost.pallas_triton import pair_sums_pallas_triton
from spotlight_jax.kernels.score_select.pallas_triton import score_select_pallas_triton
from spotlight_jax.kernels.sparse_attention.pallas_triton import (
    estimated_attention_pallas_triton,
    sparse_attention_pallas_triton,
)
from spotlight_jax.kernels.trust import is_trusted
from spotlight_jax.weights import WeightBounds

BOUNDS = WeightBounds(127, 1020)


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


KERNELS = [
    (score_select, score_select_pallas_triton, lambda: score_select.choose_impl(BOUNDS)),
    (sparse_attention, sparse_attention_pallas_triton, sparse_attention.choose_impl),
    (sparse_attention, estimated_attention_pallas_triton, sparse_attention.choose_estimated_impl),
    (hash_append, hash_append_pallas_triton, hash_append.choose_impl),
    (pair_cost, pair_sums_pallas_triton, pair_cost.choose_impl),
]
NAMES = [kernel.__name__ for _, kernel, _ in KERNELS]


@pytest.mark.parametrize("choose", [choose for *_, choose in KERNELS], ids=NAMES)
def test_a_device_that_cannot_run_a_kernel_takes_xla(gpu, choose):
    """This CPU calls itself a GPU and cannot run any of them."""
    with pytest.warns(RuntimeWarning, match="does not run here"):
        assert choose() in ("reference", "xla", "gather")


@pytest.mark.parametrize(
    "op, kernel, choose",
    [pytest.param(*each, marks=pytest.mark.slow if each[0] is score_select else ()) for each in KERNELS],
    ids=NAMES,
)
def test_every_kernel_passes_its_check_while_a_program_is_traced(gpu, monkeypatch, op, kernel, choose):
    """On the interpreter."""
    monkeypatch.setattr(op, kernel.__name__, functools.partial(kernel, interpret=True))

    def program(x):
        return x + 1 if choose() == "pallas_triton" else x

    assert float(jax.jit(program)(1.0)) == 2


def test_weights_and_scores_that_do_not_fit_take_xla_on_any_device(monkeypatch):
    monkeypatch.setattr(score_select, "is_trusted", lambda *_: True)
    assert score_select.choose_impl(BOUNDS) == "pallas_triton"
    assert {score_select.choose_impl(bounds) for bounds in (WeightBounds(128, 1020), WeightBounds(16, 4096))} == {"xla"}


@pytest.mark.gpu
@pytest.mark.parametrize("choose", [choose for *_, choose in KERNELS], ids=NAMES)
def test_every_kernel_passes_its_check_on_a_gpu(choose):
    assert choose() == "pallas_triton"
