"""Who may import whom, as the table in docs/architecture.md says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spotlight_jax"
FILES = sorted(file for top in ("spotlight_jax", "train", "eval") for file in (ROOT / top).rglob("*.py"))


def _rooms() -> dict[str, set[str]]:
    """The table: room to the rooms it may import. A row may hold several rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms: dict[str, set[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = re.findall(r"`([\w/<>]+?)(?:\.py|/)?`", cells[0])
        if len(cells) == 3 and names and "module in" not in cells[0]:
            allowed = set() if cells[2] == "nothing" else {name.strip(" `/") for name in cells[2].split(",")}
            for name in names:
                rooms[name.split("/")[0]] = allowed
    return rooms


def _room(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(file: Path) -> set[str]:
    """Modules a file imports, function bodies included; `from package import name` counts as `package.name`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(file: Path) -> set[str]:
    return {module for module in _imports(file) if module.split(".")[0] in ("spotlight_jax", "train", "eval")}


def test_the_table_is_read():
    rooms = _rooms()
    assert (
        rooms["errors"] == set() and rooms["cli"] == {"errors", "fields"} and "kernels" in rooms and "models" in rooms
    )
    named = set().union(*rooms.values())
    assert named <= set(rooms), f"the table allows rooms that it does not have: {named - set(rooms)}"


def test_the_tables_name_every_room_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    train = set(re.findall(r"^\| `(\w+)\.py` \|[^|]*\|$", text, re.MULTILINE))
    assert train == {file.stem for file in (ROOT / "train").glob("*.py")} - {"__init__"}
    assert set(_rooms()) == {_room(file) for file in FILES if PACKAGE in file.parents} - {"__init__"}


@pytest.mark.parametrize(
    "file", [file for file in FILES if PACKAGE in file.parents], ids=lambda file: file.relative_to(PACKAGE).as_posix()
)
def test_each_room_imports_only_what_the_table_allows(file):
    room = _room(file)
    if room == "__init__":
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_run_time = [node for part in tree.body if not isinstance(part, ast.If) for node in ast.walk(part)]
        found = {alias.name for node in at_run_time if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in at_run_time if isinstance(node, ast.ImportFrom)}
        assert found <= {"importlib", "typing"}, "the package itself imports nothing: every command starts at once"
        return
    rooms = _rooms()
    assert room in rooms, f"docs/architecture.md has no row for {room}"
    for module in _own(file):
        top, *rest = module.split(".")
        assert top == "spotlight_jax", f"{file} imports {module}: the library never imports train or eval"
        assert rest and rest[0] in {room, *rooms[room]}, f"{room} may not import {module}"


@pytest.mark.parametrize(("top", "other"), [("train", "eval"), ("eval", "train")])
def test_train_and_eval_never_import_each_other(top, other):
    for file in (ROOT / top).rglob("*.py"):
        assert not {module for module in _own(file) if module.split(".")[0] == other}, file


def test_methods_import_nothing_else_of_eval():
    for file in (ROOT / "eval" / "methods").glob("*.py"):
        modules = {module for module in _own(file) if module.split(".")[0] == "eval"}
        assert all(module.startswith("eval.methods") for module in modules), file


def test_progress_of_long_commands_is_shown_in_one_way():
    """`train/` and `eval/` tell it to the display of `spotlight_jax/display.py`."""
    for file in (file for top in ("train", "eval") for file in (ROOT / top).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert "rich.progress.Progress" not in text and "rich.progress import" not in text, file


def test_no_file_is_called_utils():
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_core_and_tests_work_without_torch():
    """Torch belongs to `make parity` alone: nothing of ours imports it, and everything imports without it."""
    for file in FILES:
        assert not {module for module in _imports(file) if module.split(".")[0] == "torch"}, file
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if PACKAGE in file.parents and file.stem != "__main__"
    ]
    code = f"import sys, importlib; sys.modules['torch'] = None; [importlib.import_module(m) for m in {modules}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["spotlight_jax.commands.session", "eval.needle.run"])
def test_nobody_is_told_that_torch_is_missing(module):
    """Whatever is imported first: transformers says so as it is imported, unless it was told not to before."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0 and "PyTorch" not in done.stderr, done.stderr
