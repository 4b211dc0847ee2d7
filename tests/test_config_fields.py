"""A flag that nobody reads is a lie: every field of every config is read by some of our code."""

import ast
import importlib
import math
import re
import typing
from pathlib import Path

import jax
import pytest

from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError

ROOT = Path(__file__).parent.parent


def _config_fields(tree) -> list[tuple[str, str]]:
    """Fields of the frozen dataclasses whose name ends in Config or Loss."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Loss")):
            assert any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            found += [(node.name, field) for field in fields]
    return found


def _reads(node) -> set[str]:
    """Attributes read anywhere, except by a config's own checks, which alone make a field no use."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set()
    return own.union(*map(_reads, ast.iter_child_nodes(node)))


def _unread(trees) -> list[tuple[str, str]]:
    reads = set().union(*map(_reads, trees))
    return [(name, field) for tree in trees for name, field in _config_fields(tree) if field not in reads]


def test_every_config_field_is_read():
    files = sorted(file for top in ("spotlight_jax", "train", "eval") for file in (ROOT / top).rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    assert sum(len(_config_fields(tree)) for tree in trees) > 200
    assert not _unread(trees)


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
    assert _unread([ast.parse(source)]) == [("ToyConfig", "unused")]


def _fields_of_flags() -> list[tuple[type, str, object]]:
    """Config classes of flags, their fields, and the types of these."""
    found = {}
    for top in ("spotlight_jax", "train", "eval"):
        for file in sorted((ROOT / top).rglob("*.py")):
            has_class = re.search(r"^class \w+(Config|Loss)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
            if not has_class or "models" in file.parts:  # configs of models come from files
                continue
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            for name, kind in vars(module).items():
                is_flags = re.fullmatch(r"[A-Z]\w*(Config|Loss)", name) and isinstance(kind, type)  # no common base
                if is_flags and "models" not in kind.__module__:
                    for field, hint in typing.get_type_hints(kind).items():
                        found[f"{kind.__module__}.{name}.{field}"] = (kind, field, hint)
    return list(found.values())


_FIELDS = _fields_of_flags()


def _number_fields() -> list[tuple[type, str, bool]]:
    """Fields of real numbers, and whether a field holds several."""
    kinds = (float, float | None, tuple[float, ...])
    return [(kind, field, hint == tuple[float, ...]) for kind, field, hint in _FIELDS if hint in kinds]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize(
    ("kind", "field", "is_several"), _number_fields(), ids=lambda item: getattr(item, "__name__", str(item))
)
def test_every_real_number_of_every_config_is_finite_in_single_precision(kind, field, is_several, value):
    with pytest.raises(InputError, match=rf"{field}|share|depths"):
        kind(**{field: (value,) if is_several else value})


def test_real_numbers_of_all_programs_are_tried():
    names = {(kind.__name__, field) for kind, field, _ in _number_fields()}
    assert {("OptimizerConfig", "b1"), ("MassLoss", "softness"), ("SamplingConfig", "temperature")} <= names
    assert {("DataConfig", "weights"), ("NeedleConfig", "depths"), ("LayerwiseConfig", "cache_gib")} <= names


def _count_fields() -> list[tuple[type, str, bool]]:
    """Flags that are whole numbers, and whether a flag holds several."""
    kinds = (int, int | None, tuple[int, ...])
    found = [(kind, field, hint == tuple[int, ...]) for kind, field, hint in _FIELDS if hint in kinds]
    return [(kind, field, several) for kind, field, several in found if hasattr(kind, field)]  # a default: a flag


@pytest.mark.parametrize("value", [2**32, 10**30, -(10**30)])
@pytest.mark.parametrize(
    ("kind", "field", "is_several"), _count_fields(), ids=lambda item: getattr(item, "__name__", str(item))
)
def test_no_whole_number_of_any_config_passes_the_32_bits_of_a_devices(kind, field, is_several, value):
    with pytest.raises(InputError):
        kind(**{field: (value,) if is_several else value})


_SEEDED = [kind for kind, field, _ in _FIELDS if field == "seed" and hasattr(kind, field)]  # a default: a flag


@pytest.mark.parametrize("value", [-1, 2**32, 10**30])
@pytest.mark.parametrize("kind", _SEEDED)
def test_a_seed_that_others_draw_the_same_as_is_refused_in_every_config(kind, value):
    with pytest.raises(InputError, match=rf"^seed is {value}; give a whole number from 0 to 4294967295$"):
        kind(seed=value)


def test_the_ends_of_the_range_of_seeds_draw_apart():
    assert {"SamplingConfig", "DataConfig", "EvalConfig", "LayerwiseConfig"} <= {kind.__name__ for kind in _SEEDED}
    draws = [jax.random.uniform(jax.random.key(SamplingConfig(1.0, seed=seed).seed)) for seed in (0, 1, 2**32 - 1)]
    assert len({float(draw) for draw in draws}) == 3
    assert jax.random.uniform(jax.random.key(2**32)) == draws[0]  # why larger ones are refused
