"""The public API: every name is there, documented, and imported no sooner than it is used."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import spotlight_jax
from spotlight_jax import (
    BaseModel,
    GenerateConfig,
    InputError,
    SelectionConfig,
    Selector,
    TransformConfig,
    generate,
    load_selector,
    save_selector,
    stream,
)
from spotlight_jax.config.data import DataConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from tests.byte_tokenizer import byte_tokenizer
from tests.hash_params import draw_params
from tests.train.conftest import prepared, write_inputs  # noqa: F401
from train.config import EvaluationConfig, LayerwiseConfig, TailConfig

NAMES = sorted(spotlight_jax.__all__)
ASKED_FOR = {"load_model", "load_selector", "generate", "stream", "Engine", "Selector", "GenerateConfig", "HashConfig"}
ASKED_FOR |= {"SelectionConfig", "fit", "train"}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_its_module_calls_so_and_says_what_it_is(name):
    value = getattr(spotlight_jax, name)
    assert value is getattr(importlib.import_module(spotlight_jax._MODULES[name]), name)
    if isinstance(value, types.UnionType):  # whose members are documented
        assert all(getattr(spotlight_jax, member.__name__) is member for member in value.__args__)
        return
    text = inspect.getdoc(value)
    assert text and text.split("\n\n")[0].rstrip().endswith((".", ":")), f"{name} is documented by: {text!r}"
    assert not text.startswith(f"{name}("), "a dataclass that has no docstring of its own"


def test_the_names_are_those_that_were_promised_and_no_other():
    assert set(NAMES) >= ASKED_FOR and set(NAMES) <= set(dir(spotlight_jax))
    assert spotlight_jax.__all__ == sorted(spotlight_jax._MODULES) == NAMES
    with pytest.raises(AttributeError, match="no attribute 'generates'"):
        _ = spotlight_jax.generates


def test_type_checkers_see_what_is_imported_when_it_is_used():
    tree = ast.parse(Path(spotlight_jax.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == spotlight_jax._MODULES
    assert (Path(spotlight_jax.__file__).parent / "py.typed").is_file()


def test_no_name_is_a_module_of_the_package_which_importing_would_put_in_its_place():
    parts = {path.stem for path in Path(spotlight_jax.__file__).parent.iterdir()}
    assert not parts & set(NAMES)


def test_importing_the_package_imports_neither_jax_nor_anything_that_takes_long():
    code = "import sys, time; start = time.perf_counter(); import spotlight_jax; print(time.perf_counter() - start); "
    code += "dir(spotlight_jax); sys.exit(bool({'jax', 'numpy', 'tyro', 'train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and float(done.stdout) < 0.3, done


def test_a_script_that_is_called_train_finds_ours(tmp_path):
    lines = ["import sys", "before = list(sys.path)", "from spotlight_jax import LayerwiseConfig"]
    lines += ["assert sys.path == before", "print(LayerwiseConfig.__module__)"]
    (tmp_path / "train.py").write_text("\n".join(lines))
    root = Path(spotlight_jax.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert done.stdout == "train.config\n", done.stderr


@pytest.fixture(scope="module")
def model():
    cfg = dataclasses.replace(PRESETS["tiny"], vocab=257, stop_tokens=(256,))
    return BaseModel(cfg, jax.jit(init_params, static_argnums=1)(jax.random.key(0), cfg), byte_tokenizer(), "tiny")


def test_five_lines_continue_a_text(model, tmp_path):
    shape = head_shape(model.cfg)
    params = draw_params(TransformConfig(code_bits=32), shape)
    save_selector(tmp_path / "selector", Selector(shape, params, "tiny", {}), "card")

    selector = load_selector(tmp_path / "selector")
    cfg = GenerateConfig(max_new_tokens=6, selection=SelectionConfig(keep=0.1, min_context=0))
    (result,) = generate(model, ["Once upon a time, in a land far away,"], cfg, selector)
    assert result.text == "".join(stream(model, "Once upon a time, in a land far away,", cfg, selector))
    assert 1 <= len(result.tokens) <= 6 and result.prompt_tokens == 37


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on one's own text, fitted and trained, with one config."""
    folder = tmp_path_factory.mktemp("own")
    inputs = write_inputs(folder)
    cfg = LayerwiseConfig(
        model=str(inputs.model),
        length="window",
        steps=2,
        fit_windows=2,
        data=DataConfig(window=64, held_out_windows=1),
        hash=TransformConfig(code_bits=32),
        ranking=dataclasses.replace(LayerwiseConfig().ranking, queries=8),
        measure=EvaluationConfig(queries=8, dense_layers=(0,)),
        tail=TailConfig(windows=1, queries=8, steps=5),
    )
    return inputs, cfg, folder


@pytest.mark.slow
def test_fitting_is_the_start_of_training(prepared, trained):  # noqa: F811
    inputs, cfg, folder = trained
    fitted = spotlight_jax.fit(inputs.tokens, cfg)
    run = spotlight_jax.train([inputs.tokens], folder / "run", cfg)
    assert fitted.base_model == run.base_model == str(inputs.model.resolve())
    assert fitted.positions == run.positions == 64
    for one, other in zip(jax.tree.leaves(fitted.params.stats), jax.tree.leaves(run.params.stats), strict=True):
        np.testing.assert_array_equal(one, other)  # fitted once, never trained
    assert not np.array_equal(fitted.params.weights.bit_weights, run.params.weights.bit_weights)
    assert fitted.params.tail is not None and 0 < run.info["metrics"]["mass"] <= 1
    assert fitted.info["recipe"]["data"]["train"] == [str(inputs.tokens)]
    card = (folder / "run" / "selector" / "README.md").read_text(encoding="utf-8")
    assert f"{run.info['metrics']['mass']:.3f}" in card and "2 steps, windows of 64 tokens" in card


def test_bad_input_is_an_input_error_before_anything_is_loaded(trained, tmp_path):
    inputs, cfg, _ = trained
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(InputError, match="run"):
        spotlight_jax.train(inputs.tokens, tmp_path / "run", cfg)
    started = time.perf_counter()
    with pytest.raises(InputError, match="no such model"):
        spotlight_jax.fit(inputs.tokens, dataclasses.replace(cfg, model="none"))
    assert time.perf_counter() - started < 5
