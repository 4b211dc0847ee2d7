"""What "add a method" and "add an op" say, followed to the letter in a copy, ends with green tests."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT, read_blocks


def _python(page):
    return [block.text for block in read_blocks(ROOT / "docs" / "guides" / page) if block.language == "python"]


def _insert(file, before, text):
    """Put lines before the first place of a line that is there."""
    found = file.read_text(encoding="utf-8")
    assert before in found, (file, before)
    file.write_text(found.replace(before, text + before, 1), encoding="utf-8")


def _add_method(folder):
    module, line, look, test = _python("add-method.md")
    (folder / "eval/methods/norm.py").write_text(module)
    _insert(folder / "eval/methods/__init__.py", '    "binary": "binary"', line)
    _insert(folder / "eval/common/labels.py", '    "binary": {', look)
    with (folder / "tests/eval/methods/test_methods.py").open("a") as file:
        file.write("\n\n" + test)


def _add_op(folder):
    *modules, table, tested = _python("add-op.md")
    op = folder / "spotlight_jax/kernels/count_above"
    op.mkdir()
    for name, text in zip(("reference", "blocked", "cases", "__init__"), modules, strict=True):
        (op / f"{name}.py").write_text(text)
    kernels = folder / "spotlight_jax/kernels/table.py"
    _insert(kernels, '    "match_score": Op(', table)
    imports = "from spotlight_jax.kernels import count_above\n"
    imports += "from spotlight_jax.kernels.count_above.cases import CASES as COUNT_ABOVE\n"
    _insert(kernels, "from spotlight_jax.kernels import hash_append", imports)
    _insert(folder / "tests/kernels/ops.py", '    "match_score": Tested(', tested)


@pytest.mark.slow
def test_following_a_guide_ends_with_green_tests(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("spotlight_jax", "train", "eval", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    _add_method(tmp_path)
    _add_op(tmp_path)
    files = ["tests/eval/methods/test_methods.py", "tests/eval/common/test_labels.py", "tests/kernels/test_ops.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *files]
    command += ["-k", "norm or count_above or look_different"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 10, done.stdout[-3000:]
