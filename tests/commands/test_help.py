"""Help of every command is there in a moment: nothing is imported for it that only a run needs."""

import subprocess
import sys

import pytest

from spotlight_jax import cli

HEAVY = set("jax flax optax orbax transformers tokenizers datasets pyarrow matplotlib lm_eval gguf".split())  # noqa: SIM905
CASES = [*(name.split() for name, _, _ in cli._COMMANDS), ["eval", "longbench", "score"]]

PROGRAM = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


def _help(*words: str) -> tuple[str, str]:
    """What is printed, and which heavy modules were imported for it."""
    command = [sys.executable, "-c", PROGRAM, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_help_imports_nothing_that_only_a_run_needs(words):
    text, heavy = _help("spotlight_jax.cli", *words)
    assert "usage:" in text and "show this help message" in text
    assert heavy == "[]\n"


@pytest.mark.parametrize("module", ["train.layerwise", "train.demo"])
def test_a_trainers_own_help_does_not_either(module):
    text, heavy = _help(module)
    assert "usage:" in text and heavy == "[]\n"
