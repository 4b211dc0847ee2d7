"""Command blocks of README and guides: run with a tiny model in place of a real one, or their flags parsed."""

import ast
import importlib
import importlib.util
import io
import json
import sys
import textwrap

import numpy as np
import pytest

import spotlight_jax
from spotlight_jax import cli
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models import load
from spotlight_jax.models.source import lasting_name
from spotlight_jax.selector.checkpoint import Selector, save_selector
from tests.byte_tokenizer import byte_tokenizer
from tests.docs.blocks import PARSED, ROOT, RUN, all_blocks
from tests.hash_params import draw_params
from tests.models import tiny
from tests.train.conftest import _prepare as prepare_training

# What is not ours: shells, installers, other programs. Their lines are read by people alone.
FOREIGN = ("pip", "python3", ".venv/bin/pip", ".", "echo", "export", "make", "docker")
SHELL, PYTHON = all_blocks("sh"), all_blocks("python")
SIZES = {"num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 8192, "eos_token_id": 256}
MODEL = tiny.CASES["llama3"] | SIZES


def _assignment(words):
    return "=" in words[0] and not words[0].startswith("-")


def start(words):
    """Run a command of ours; returns its exit code."""
    if words[0] == "spotlight":
        return cli.main(words[1:])
    assert words[:2] == ["python", "-m"], words
    if words[2].startswith("tests."):
        return 0 if importlib.util.find_spec(words[2]) else 2
    if words[2] == "pytest":
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), words
        return 0
    return importlib.import_module(words[2]).command(words[3:])


def ours(block):
    """The block's commands that are ours."""
    commands = [[*words] for words in block.commands() if words]
    for words in commands:
        while words and (_assignment(words) or words[0] == "srun"):
            del words[0]
    return [words for words in commands if words and words[0] not in FOREIGN]


def test_every_block_of_ours_says_how_it_is_tested():
    assert [block.name for block in SHELL if ours(block) and block.marker is None] == []
    assert {block.marker for block in SHELL + PYTHON} <= {None, *RUN, *PARSED}
    assert sum(block.marker in RUN for block in SHELL) >= 6 and len(SHELL) > 25


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_flags_exist_and_fit_together(block, monkeypatch, capsys):
    """A command is parsed as it would be, and not run. What --resume starts from is another run, so it is left out."""
    parsed = []

    def parse_alone(main, config_class, prog, description, args=None, default=None):
        given = [word for word in args if word != "--resume"]
        begin = default(given) if callable(default) else default
        try:
            parsed.append(cli.parse(config_class, prog, description, given, begin))
        except cli.InputError as error:
            return cli._fail(prog, str(error))
        return 0

    monkeypatch.setattr(cli, "run", parse_alone)
    for words in ours(block):
        assert start(words) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder in which the pages' commands find what they name: a text, token ids, a run with its selector."""
    folder = tmp_path_factory.mktemp("docs")
    cfg = tiny.write_folder(folder / "MODEL", MODEL)
    byte_tokenizer().save_pretrained(folder / "MODEL")
    (folder / "MODEL" / "config.json").write_text(json.dumps(MODEL))
    rng = np.random.default_rng(0)
    (folder / "book.txt").write_text(" ".join("".join(rng.choice(list("abcdef"), 5)) for _ in range(2000)))
    np.save(folder / "tokens.npy", rng.integers(0, 256, 2000).astype(np.uint16))
    shape = head_shape(cfg)
    base = lasting_name(str(folder / "MODEL"))
    selector = Selector(shape, draw_params(TransformConfig(code_bits=32), shape), base, {}, positions=8192)
    save_selector(folder / "runs" / "demo" / "selector", selector, "card")
    return folder


@pytest.fixture
def in_place(stand_ins, monkeypatch):
    """The folder of stand-ins as the working folder; the embedded model is the tiny one."""
    real = load.load_model
    monkeypatch.chdir(stand_ins)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def load_tiny(name, *args, **more):
        return real("MODEL" if name == "smollm2-135m" else name, *args, **more)

    monkeypatch.setattr(load, "load_model", load_tiny)
    monkeypatch.setattr(spotlight_jax, "load_model", load_tiny, raising=False)
    prepare_training(monkeypatch)
    for module in [
        module for name, module in sys.modules.items() if name.startswith(("spotlight_jax", "train", "eval"))
    ]:
        if hasattr(module, "use_compile_cache"):  # compiled programs stay where the tests keep them
            monkeypatch.setattr(module, "use_compile_cache", lambda: stand_ins / "compiled")
    return stand_ins


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in SHELL if block.marker in RUN], ids=lambda block: block.name)
def test_blocks_run(block, in_place, capsys):
    for words in ours(block):
        assert start(words) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in PYTHON if block.marker in RUN], ids=lambda block: block.name)
def test_python_blocks_run(block, in_place, capsys):
    exec(compile(block.text, block.name, "exec"), {"__name__": "block"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_blocks_are_python(block):
    """A line for a table is part of a dictionary."""
    text = textwrap.dedent(block.text)
    ast.parse(f"{{{text}}}" if text.startswith('"') and not text.startswith('"""') else text)
