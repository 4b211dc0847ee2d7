"""Run folders: the resolved config, versions and device, one line of metrics a measurement, a summary."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import typing
from typing import Any, TypeVar

import jax
import yaml

from spotlight_jax import files
from spotlight_jax.errors import InputError

Config = TypeVar("Config")

_PACKAGES = ("spotlight-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


class RunFolder:
    """One run's folder. Nothing in it is ever overwritten but the summary and the pictures of the run itself."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    @staticmethod
    def check_free(path: pathlib.Path) -> None:
        """Raise InputError where a new run cannot have this folder."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"'{path}' exists already; give another --out, or --resume to continue that run")

    @classmethod
    def create(cls, path: pathlib.Path, cfg: Any) -> "RunFolder":
        """A new folder with `config.yaml` and `env.json`; raises InputError where the path is taken or not writable."""
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            files.write_json(path / "env.json", environment())
            files.write_text(path / "config.yaml", yaml.safe_dump(to_plain(cfg), sort_keys=False))
        except OSError as error:
            raise InputError(f"cannot write the run folder '{path}': {error.strerror}") from None
        return cls(path)

    def config(self, config_class: type[Config]) -> Config:
        """The config the run was started with; raises InputError where there is none or it does not fit."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise InputError(f"'{self.path}' is no run folder (it has no config.yaml); start the run without --resume")
        try:
            plain = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise InputError(f"'{file}' is not readable YAML; start a new run") from None
        return from_plain(config_class, plain, str(file))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        files.append_lines(self.path / "metrics.jsonl", json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far; a line that a crash cut short is dropped."""
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def discard_if_unused(self) -> None:
        """Remove the folder where it holds nothing but what `create` wrote: a run that was refused keeps no name."""
        found = list(self.path.iterdir())
        if {file.name for file in found} <= {"config.yaml", "env.json"}:
            for file in found:
                file.unlink()
            self.path.rmdir()

    def keep_metrics_before(self, step: int) -> None:
        """Drop rows from `step` on, which a resumed run will write again."""
        rows = [row for row in self.metrics() if row.get("step", 0) < step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_text(self.path / "metrics.jsonl", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        files.write_json(self.path / "summary.json", summary)


def next_free(parent: pathlib.Path, name: str) -> pathlib.Path:
    """`parent/name`, or `parent/name-2`, `-3`, ... where that is taken."""
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def to_plain(cfg: Any) -> Any:
    """A config as dicts, lists and scalars."""
    if dataclasses.is_dataclass(cfg):
        return {field.name: to_plain(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}
    return [to_plain(item) for item in cfg] if isinstance(cfg, tuple) else cfg


def from_plain(config_class: type[Config], plain: Any, source: str) -> Config:
    """The config that `to_plain` gave; raises InputError on fields that are missing or unknown."""
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    if not isinstance(plain, dict) or set(plain) != fields:
        unfit = sorted(fields ^ set(plain)) if isinstance(plain, dict) else ["all"]
        raise InputError(f"'{source}' does not fit this version ({', '.join(unfit)} missing or unknown)")
    kinds = typing.get_type_hints(config_class)
    return config_class(**{name: _from_plain_value(kinds[name], value, source) for name, value in plain.items()})


def _from_plain_value(kind: Any, value: Any, source: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_plain(typing.cast(type, kind), value, source)
    return tuple(value) if isinstance(value, list) else value


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Names of the fields in which two configs of one class differ, as flags."""
    if dataclasses.is_dataclass(first):
        names = []
        for field in dataclasses.fields(first):
            pair = getattr(first, field.name), getattr(second, field.name)
            names += differences(*pair, prefix=f"{prefix}{field.name.replace('_', '-')}.")
        return names
    return [] if first == second else ["--" + prefix.rstrip(".")]
