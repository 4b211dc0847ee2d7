"""What is true of every op: all its implementations give what its reference gives, at every shape of a real model."""

import functools

import jax
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.kernels.table import OPS
from tests.kernels.cuda import lower_for_cuda
from tests.kernels.ops import TESTED

KERNELS = [name for name, tested in TESTED.items() if tested.kernels]


def over_cases(implementations, is_slow=lambda name, case, impl: False):
    """Op, case and implementation; `implementations(name)` names those of an op."""
    return [
        pytest.param(
            name,
            case,
            impl,
            id=f"{name}-{case.name}-{impl}",
            marks=pytest.mark.slow if is_slow(name, case, impl) else (),
        )
        for name, op in OPS.items()
        for case in op.cases
        for impl in implementations(name)
    ]


def with_kernel(name, kernel):
    """An op's plain implementations, and its kernel by the name it goes by."""
    return (*OPS[name].plain, kernel) if name in KERNELS else OPS[name].plain


@functools.cache
def small_reference(name, case):
    return TESTED[name].call("reference", case)


@pytest.mark.parametrize(
    "name, case, impl",
    over_cases(
        lambda name: with_kernel(name, "interpreted"),
        is_slow=lambda name, case, impl: impl == "interpreted" and case is not OPS[name].cases[0],
    ),
)
def test_every_implementation_equals_the_reference(name, case, impl):
    """At a real model's heads and widths, with fewer tokens; kernels on the interpreter."""
    tested, small = TESTED[name], TESTED[name].shrink(case)
    tested.check(tested.call(impl, small), small_reference(name, small), small)


@pytest.mark.gpu
@pytest.mark.parametrize("name, case, impl", over_cases(lambda name: with_kernel(name, "pallas_triton")))
def test_every_implementation_equals_the_reference_on_a_gpu(name, case, impl):
    """At the real shapes; the reference with products as exact as float32."""
    tested = TESTED[name]
    with jax.default_matmul_precision("highest"):
        expected = tested.call("reference", case)
    tested.check(tested.call(impl, case), expected, case)


@pytest.mark.parametrize(
    "name, case, impl", over_cases(lambda name: ("pallas_triton",) if name in KERNELS else ("auto",))
)
def test_every_case_lowers_for_cuda(name, case, impl):
    """To the op's kernels alone, or to plain XLA without a sort."""
    static, structures = {}, []

    def draw():
        arrays, more = case.draw()
        static.update(more)
        leaves, structure = jax.tree.flatten(arrays)
        structures.append(structure)
        return leaves

    def run(*leaves):
        return OPS[name].run(*jax.tree.unflatten(structures[0], leaves), impl=impl, **static)

    text = lower_for_cuda(run, *jax.eval_shape(draw))
    assert all(f'name = "{kernel}"' in text for kernel in TESTED[name].kernels)
    assert "stablehlo.sort" not in text and "top_k" not in text
    assert name not in KERNELS or "stablehlo.dot" not in text


@pytest.mark.parametrize("name", OPS)
def test_auto_takes_one_of_the_named_implementations(name):
    for case in OPS[name].cases:
        assert OPS[name].choose(case) in ("reference", *OPS[name].plain)  # no kernel without a GPU


@pytest.mark.parametrize("name", KERNELS)
def test_a_named_kernel_raises_where_it_cannot_run(name):
    with pytest.raises(ValueError, match="interpret mode"):
        TESTED[name].call("pallas_triton", TESTED[name].shrink(OPS[name].cases[0]))


@pytest.mark.parametrize("name", OPS)
def test_a_name_that_an_op_does_not_have_is_refused(name):
    """Tests check types at each call, users' programs do not."""
    arrays, static = TESTED[name].shrink(OPS[name].cases[0]).draw()
    run = getattr(OPS[name].run, "__wrapped__", OPS[name].run)
    with pytest.raises(InputError, match="has no implementation 'cuda'; give auto, reference"):
        run(*arrays, **static, impl="cuda")
