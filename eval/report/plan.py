"""What a report runs: a YAML file of evaluations, checked as a whole before anything starts."""

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eval.common.flags import EvalConfig
from eval.methods import OF_SELECTOR
from eval.model.load import name_model
from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import nearest

DEFAULT = Path(__file__).parent / "plan.yaml"

# name in a plan to the module whose `main(cfg)` runs it; its config has `out` and `resume`
EVALUATIONS = {
    "inspect": "eval.inspect.run",
    "perplexity": "eval.perplexity.run",
    "needle": "eval.needle.run",
    "longbench": "eval.longbench.answer",
    "harness": "eval.harness.run",
    "speed": "eval.speed.run",
}
RESERVED = ("out", "resume")  # set by the report
# What --fraction cuts down: lists to their first entries, numbers to a share.
LISTS = ("texts", "lengths", "depths", "keep", "settings", "tasks", "batches", "model_lengths", "model_batches")
_PLAIN, _DEEPEST = (str, int, float, bool), 4
LEAST = {"texts": 2}  # a copy text is made of two
COUNTS = ("windows_per_text", "queries", "samples", "limit", "rounds", "new_tokens")


@dataclasses.dataclass(frozen=True)
class PlannedPart:
    """One evaluation of a plan."""

    name: str  # its folder and heading
    evaluation: str
    config: Any
    main: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of a report."""

    title: str
    parts: tuple[PlannedPart, ...]


def read_plan(path: Path, given: Mapping[str, Any], fraction: float) -> Plan:
    """Read, complete and check a plan.

    Args:
        path: a YAML file; see `plan.yaml`.
        given: fields from the command line, which come before the plan's.
        fraction: see `cut_down`.

    Raises:
        InputError: names the file and what is wrong in it, such as no YAML, an unknown evaluation or field (with the
            nearest), a value that does not fit.
    """
    plan = _load(path)
    common = {name: value for name, value in plan.items() if name not in ("title", "evaluations")} | dict(given)
    evaluations = plan.get("evaluations")
    if not isinstance(evaluations, dict) or not evaluations:
        raise InputError(f"'{path}' needs `evaluations:`, a mapping of names to their flags")
    parts: list[PlannedPart] = []
    used: set[str] = set()
    for name, flags in evaluations.items():
        where = f"'{path}', {name}"
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise InputError(f"{where}: names are folders; use letters, digits, - and _")
        if flags is not None and not isinstance(flags, dict):
            raise InputError(f"{where}: expected a mapping of flags, got {flags!r}")
        fields = dict(flags or {})
        evaluation = fields.pop("eval", name)
        if not isinstance(evaluation, str) or evaluation not in EVALUATIONS:
            raise InputError(f"{where}: there is no evaluation '{evaluation}'{nearest(str(evaluation), EVALUATIONS)}")
        module = importlib.import_module(EVALUATIONS[evaluation])
        config_class = typing.get_type_hints(module.main)["cfg"]
        kinds = typing.get_type_hints(config_class)
        shared = {field: _fitting(value, kinds[field]) for field, value in common.items() if field in kinds}
        used |= shared.keys()
        fields = _without_spotlight(shared | fields)
        parts.append(PlannedPart(str(name), evaluation, _configure(config_class, fields, where, fraction), module.main))
    if not isinstance(plan.get("title", ""), str):
        raise InputError(f"'{path}', title: expected text")
    if unused := [name for name in common if name not in used and name not in given]:
        known = {field.name for part in parts for field in dataclasses.fields(part.config)} | {"title", "evaluations"}
        raise InputError(f"'{path}': no evaluation has a field '{unused[0]}'{nearest(unused[0], sorted(known))}")
    return Plan(str(plan.get("title", "Evaluation")), tuple(parts))


def _fitting(value: Any, kind: Any) -> Any:
    """Return a common flag's value for one evaluation: the first of a list where that takes a single one."""
    return value[0] if isinstance(value, list) and value and typing.get_origin(kind) is not tuple else value


def _load(path: Path) -> dict[str, Any]:
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the plan '{path}': {error.strerror}") from None
    except (RecursionError, ValueError) as error:  # a UnicodeDecodeError is left to the next
        if not isinstance(error, UnicodeDecodeError):
            raise InputError(f"'{path}' is no plan: it is nested too deeply, or a value cannot be read") from None
        raise InputError(f"'{path}' is no YAML: not UTF-8") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "not UTF-8"
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"'{path}'{where} is no YAML: {reason}") from None
    if not isinstance(plan, dict):
        raise InputError(f"'{path}' is no plan; it needs `evaluations:`")
    _check_plain(plan, f"'{path}'", depth=0)
    return plan


def _check_plain(value: Any, where: str, depth: int) -> None:
    """Raise InputError for what no flag can be: a plan holds mappings by name, lists of plain values, plain values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str) or depth > _DEEPEST:
                raise InputError(f"{where}: {name!r:.40} is no name of a flag, or stands too deep")
            _check_plain(inner, f"{where}, {name}", depth + 1)
    elif isinstance(value, list):
        if any(not isinstance(item, _PLAIN) for item in value):
            raise InputError(f"{where}: a list holds plain values alone")
    elif value is not None and not isinstance(value, _PLAIN):
        raise InputError(f"{where}: expected text or a number, got {type(value).__name__}")


def _without_spotlight(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out `spotlight`, with its tail too, where there is no selector."""
    methods = fields.get("methods")
    if fields.get("selector") is None and isinstance(methods, list):  # what is no list is refused as a flag would be
        return fields | {"methods": [name for name in methods if name not in OF_SELECTOR]}
    return fields


def _configure(config_class: type, fields: dict[str, Any], where: str, fraction: float) -> Any:
    """Make a config from a plan's fields, checked as flags are."""
    _check_fields(config_class, fields, where)
    try:
        cfg = cut_down(cli.parse(config_class, "spotlight eval report", "", list(_flags(fields))), fraction)
        return name_model(cfg) if isinstance(cfg, EvalConfig) else cfg
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except OSError as error:  # a name that no file can have
        raise InputError(f"{where}: {error.strerror}: '{error.filename}'") from None


def _check_fields(config_class: type, fields: dict[str, Any], where: str) -> None:
    """Raise InputError for a field that a config does not have, nested ones too."""
    kinds = typing.get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class) if field.name not in RESERVED]
    for name, value in fields.items():
        if name not in known:
            raise InputError(f"{where}: there is no field '{name}'{nearest(str(name), known)}")
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(kinds[name]):
                raise InputError(f"{where}: {name} is no group of fields; give a value or a list")
            _check_fields(typing.cast(type, kinds[name]), value, f"{where}, {name}")


def _flags(fields: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Yield a plan's fields as they stand on a command line."""
    for name, value in fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            yield flag if value else f"{prefix}no-{name.replace('_', '-')}"
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        elif value is not None:
            yield from (flag, str(value))


def cut_down(cfg: Any, fraction: float) -> Any:
    """Cut lists to their first entries and counts to a share; never to nothing, texts not below two."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in LISTS and isinstance(value, tuple) and value:
            changes[field.name] = value[: max(math.ceil(fraction * len(value)), LEAST.get(field.name, 1))]
        elif field.name in COUNTS and value is not None:
            changes[field.name] = max(1, round(fraction * min(value, 2**53)))  # no float is larger by one
    return dataclasses.replace(cfg, **changes)
