"""What examples/ shows works, on tiny models; each example's `main` is what a user runs on a real one."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from eval.methods.opening import open_method
from eval.perplexity import PerplexityConfig
from spotlight_jax import (
    BaseModel,
    GenerateConfig,
    InputError,
    NetworkConfig,
    Selector,
    TransformConfig,
    save_selector,
    stream,
)
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.scoring import hash_scores
from tests.byte_tokenizer import byte_tokenizer
from tests.eval.tiny import write_inputs
from tests.hash_params import draw_params

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SHAPE = HeadShape(layers=3, q_heads=6, kv_heads=2, head_dim=16)
KV_LEN = 150


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    cfg = dataclasses.replace(PRESETS["tiny"], vocab=257, stop_tokens=(256,))
    return BaseModel(cfg, jax.jit(init_params, static_argnums=1)(jax.random.key(0), cfg), byte_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def selector(model):
    shape = head_shape(model.cfg)
    return Selector(shape, draw_params(TransformConfig(code_bits=32), shape), "tiny", {})


@pytest.mark.parametrize("name", NAMES)
def test_every_example_says_how_it_is_run(name):
    text = load(name).__doc__
    assert f"python examples/{name}.py" in text


def test_the_numpy_reader_needs_numpy_alone():
    code = "import sys; import numpy; before = set(sys.modules); import numpy_reader; "
    code += "tops = {name.partition('.')[0] for name in set(sys.modules) - before}; "
    code += "print(tops - set(sys.stdlib_module_names) - {'numpy', 'numpy_reader'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("bits", "sums"), [(32, 2), (64, 1), (128, 2)])
def test_the_numpy_reader_scores_as_decoding_does(tmp_path, bits, sums):
    reader = load("numpy_reader")
    cfg = TransformConfig(code_bits=bits, sums=sums)
    short, params = (draw_params(cfg, SHAPE, seed) for seed in (1, 2))
    save_selector(tmp_path, Selector(SHAPE, params, "tiny", {}, positions=400, shorter=((100, short),)), "card")
    rng = np.random.default_rng(bits)
    keys = rng.normal(size=(KV_LEN, SHAPE.kv_heads, SHAPE.head_dim)).astype(np.float32)
    queries = rng.normal(size=(SHAPE.q_heads, SHAPE.head_dim)).astype(np.float32)

    @jax.jit
    def score(functions, queries, keys):
        return hash_scores(functions, queries[None, None], functions.key_codes(keys[None]), per_kv_head=True)[0, 0]

    for length, functions in ((100, short), (101, params)):
        for layer in range(SHAPE.layers):
            arrays = reader.read_layer(tmp_path, layer, length)
            found = reader.scores(arrays, queries, reader.key_bits(arrays, keys))
            np.testing.assert_array_equal(found, score(functions.layer(layer), queries, keys))


def test_the_numpy_reader_refuses_forms_that_it_does_not_know(tmp_path):
    params = draw_params(NetworkConfig(code_bits=32, hidden=8), SHAPE)
    save_selector(tmp_path, Selector(SHAPE, params, "tiny", {}), "card")
    with pytest.raises(AssertionError, match="selector-format"):
        load("numpy_reader").read_layer(tmp_path, 0, 1)


def test_the_format_page_names_every_array_of_a_selector(tmp_path):
    page = (EXAMPLES.parent / "docs" / "selector-format.md").read_text(encoding="utf-8")
    reader = load("numpy_reader")
    for cfg in (TransformConfig(code_bits=32), NetworkConfig(code_bits=32, hidden=8)):
        save_selector(tmp_path, Selector(SHAPE, draw_params(cfg, SHAPE), "tiny", {}), "card")
        for name in reader.read_safetensors(tmp_path / "selector.safetensors"):
            assert f"`{name}`" in page or f"`{name.rpartition('.')[2]}`" in page, name
    for field in json.loads((tmp_path / "config.json").read_text()):
        assert f"`{field}`" in page or field == "base_model_is_lasting", field


def test_generate_continues_a_text(model, selector, capsys):
    result = load("generate").main(model, "Once upon a time, in a land far away,", selector, max_new_tokens=5)
    shown = capsys.readouterr().out
    assert shown.startswith("37 tokens of prompt") and result.text in shown


def test_a_web_handler_streams_what_stream_gives(model, selector):
    cfg = GenerateConfig(max_new_tokens=6, selection=SelectionConfig(min_context=0))
    client = TestClient(load("stream_web").make_app(model, selector, cfg))
    answer = client.post("/continue", content="Once upon a time")
    assert answer.status_code == 200 and answer.text == "".join(stream(model, "Once upon a time", cfg, selector))
    for bad, told in ((b"", "empty"), (b"\xff\xfe", "utf-8"), (b"x" * 9000, "shorten")):
        answer = client.post("/continue", content=bad)
        assert answer.status_code == 400 and told in answer.text and answer.text.count("\n") == 1


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two texts, a selector and the flags that both examples of evaluation are run with."""
    folder = tmp_path_factory.mktemp("eval")
    write_inputs(folder)
    return PerplexityConfig(
        model="random:tiny",
        selector=str(folder / "selector"),
        methods=("dense", "window", "spotlight"),
        keep=(0.1,),
        texts=(str(folder / "one.npy"),),
        window=64,
        windows_per_text=1,
        out=str(folder / "out"),
    )


def test_methods_are_compared_by_what_they_read(compared, capsys):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        rows = load("compare_methods").main(compared)
    last = shown.getvalue().splitlines()[-3:]
    assert {line.split()[0] for line in last} == {row["method"] for row in rows} == set(compared.methods)
    assert sum("1.000 of dense" in line and line.startswith("dense") for line in last) == 1


def test_a_method_is_added_from_outside(compared, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    name = "add_method:open_key_signs"
    cfg = dataclasses.replace(compared, methods=("dense", name), out=f"{compared.out}-2")
    dense, own = load("add_method").main(cfg)
    assert own["method"] == name and own["tokens_read"] < dense["tokens_read"]
    bits = PRESETS["tiny"].kv_heads * PRESETS["tiny"].head_dim
    assert own["index_bytes"] == bits // 8 * 32  # one layer selects; queries see 1 to 63 tokens


def test_an_added_method_ranks_by_signs(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    method = open_method("add_method:open_key_signs", None, SelectionConfig(keep=0.1, min_context=0), SHAPE)
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(1, 2, 6, 16)).astype(np.float32), rng.normal(size=(1, 9, 2, 16)).astype(np.float32)
    run = jax.jit(lambda q, k: method.scores(q, k, method.index(k, np.array([9], np.int32)), None))
    expected = np.einsum("tkgd,skd->tks", queries[0].reshape(2, 2, 3, 16), np.sign(keys[0]))
    np.testing.assert_allclose(run(queries, keys)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:open_it", "No module named 'no_such_module'; set PYTHONPATH"),
        ("add_method:open_it", "module 'add_method' has no 'open_it'"),
        ("add_method:", "there is no method"),
        ("add-method:open_it", "there is no method"),
    ],
)
def test_a_method_that_is_not_there_is_one_line(monkeypatch, name, told):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(InputError, match=told):
        open_method(name, None, SelectionConfig(), SHAPE)


RUN_NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600).execute()
print(sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())))
"""


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last_and_shows_its_pictures(tmp_path):
    notebook = EXAMPLES / "tour.ipynb"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "MPLBACKEND"):  # a whole model runs; pictures go into the notebook
        environment.pop(name, None)
    command = [sys.executable, "-c", RUN_NOTEBOOK, str(notebook)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == notebook.read_text(encoding="utf-8").count("plt.show()") > 0


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
