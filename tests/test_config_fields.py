"""A flag that nobody reads is a lie: every field of every config is read by some of our code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = [
    ast.parse(file.read_text(encoding="utf-8"))
    for top in ("spotlight_jax", "train", "eval")
    for file in sorted((ROOT / top).rglob("*.py"))
]


def _config_fields(trees) -> list[tuple[str, str]]:
    """Fields of the frozen dataclasses whose name ends in Config."""
    found = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            assert any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            found += [(node.name, field) for field in fields]
    return found


def _reads(trees) -> set[str]:
    """Attributes read anywhere, except by a config's own checks, which alone make a field no use."""
    checks = {
        id(node)
        for tree in trees
        for check in ast.walk(tree)
        if isinstance(check, ast.FunctionDef) and check.name == "__post_init__"
        for node in ast.walk(check)
    }
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
    }


READS = _reads(TREES)


@pytest.mark.parametrize(("config", "field"), _config_fields(TREES))
def test_every_config_field_is_read(config, field):
    assert field in READS


def test_a_field_that_only_its_own_check_reads_is_found():
    source = """
@dataclass(frozen=True)
class ToyConfig:
    used: int
    unused: int
    def __post_init__(self):
        assert self.unused
def f(cfg):
    return cfg.used
"""
    trees = [ast.parse(source)]
    assert [field for _, field in _config_fields(trees) if field not in _reads(trees)] == ["unused"]
