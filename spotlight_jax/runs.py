"""Run folders: the resolved config, versions and device, one line of metrics a measurement, a summary."""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import yaml

from spotlight_jax import files, manifest
from spotlight_jax.errors import InputError
from spotlight_jax.fields import is_config, pick_class

Config = TypeVar("Config")

LOCK = ".lock"  # the file in a run folder that says who writes to it

_PACKAGES = ("spotlight-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


class RunFolder:
    """One run's folder. Nothing in it is ever overwritten but the summary and the pictures of the run itself."""

    def __init__(self, path: pathlib.Path, is_written: bool = True) -> None:
        """Open a folder that there is.

        Args:
            is_written: False where another process of the same run writes it: this one then only reads.
        """
        self.path, self.is_written = path, is_written

    @staticmethod
    def check_free(path: pathlib.Path) -> None:
        """Raise InputError where a new run cannot have this folder."""
        if path.exists() and (not path.is_dir() or any(not _is_before_run(file) for file in path.iterdir())):
            raise InputError(f"'{path}' exists already; give another --out, or --resume to continue that run")

    @classmethod
    def create(cls, path: pathlib.Path, cfg: Any) -> "RunFolder":
        """Create a folder with `config.yaml` and `env.json`; raises InputError where it is taken or not writable."""
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            files.write_json(path / "env.json", environment())
            files.write_text(path / "config.yaml", yaml.safe_dump(to_plain(cfg), sort_keys=False))
            manifest.seal_folder(path, ("config.yaml",))
        except OSError as error:
            raise InputError(f"cannot write the run folder '{path}': {error.strerror}") from None
        return cls(path)

    def config(self, config_class: type[Config]) -> Config:
        """Read the config that the run was started with; raises InputError where there is none or it does not fit."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise InputError(f"'{self.path}' is no run folder (it has no config.yaml); start the run without --resume")
        if (self.path / manifest.FILE).is_file() and (damage := manifest.find_damage(self.path)):  # old ones have none
            raise InputError(f"'{self.path}': {damage}; a run keeps its flags, so start a new run for other ones")
        try:
            plain = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):  # bytes that are no text, days that no month has, nesting
            raise InputError(f"'{file}' is not readable YAML; start a new run") from None
        return from_plain(config_class, plain, str(file))

    def check_resumed(self, cfg: Any, free_fields: Sequence[str]) -> None:
        """Raise InputError where a resumed run has other flags than it was started with, which the line names.

        Args:
            free_fields: in which it may differ.
        """
        stored = self.config(type(cfg))
        same = dataclasses.replace(stored, **{field: getattr(cfg, field) for field in free_fields})
        if changed := differences(same, cfg):
            raise InputError(
                f"the run in '{self.path}' was started with other flags ({', '.join(changed)}); "
                "resume with those, or give another --out"
            )

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        if self.is_written:
            files.append_lines(self.path / "metrics.jsonl", json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read all rows so far; a line that a crash cut short is dropped."""
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
        found = [file for file in self.path.iterdir() if file.name != LOCK]
        if {file.name for file in found} <= {"config.yaml", "env.json", manifest.FILE}:
            for file in found:
                file.unlink()

    def keep_metrics_before(self, step: int) -> None:
        """Drop rows from `step` on, which a resumed run will write again."""
        rows = [row for row in self.metrics() if row.get("step", 0) < step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if self.is_written:
            files.write_text(self.path / "metrics.jsonl", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        files.write_json(self.path / "summary.json", summary)


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """Keep a folder for this process while the block runs; the folder is made, and removed again if it stays empty.

    The lock is the system's and ends with the process, however that ends. File systems without locks have none.

    Raises: InputError where another process holds the folder, which it names, or where it cannot be written.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except FileExistsError:
        raise InputError(f"'{path}' exists already and is no folder; give another --out") from None
    except OSError as error:
        raise InputError(f"cannot write the run folder '{path}': {error.strerror}") from None
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()
                for folder in made if not any(path.iterdir()) else ():
                    folder.rmdir()


def _lock(path: pathlib.Path) -> TextIO:
    """Open the folder's lock file, locked by this process, which it names."""
    lock = os.fdopen(os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(200).strip() or "another process"
        lock.close()
        raise InputError(f"'{path}' is being written by {holder}") from None
    except OSError:
        pass  # this file system has no locks
    if not (path / LOCK).exists():  # its last holder took it away between our two calls
        lock.close()
        return _lock(path)
    with contextlib.suppress(OSError):
        lock.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {platform.node()}, which began at {now}\n")
        lock.flush()
    return lock


def _is_before_run(file: pathlib.Path) -> bool:
    """Whether a file is there before the config is, which makes a folder a run: its process ended before that."""
    return file.name in (LOCK, "env.json") or file.name.endswith(".partial")


def check_destination(out: str | None, resume: bool) -> None:
    """Raise InputError where results cannot be written: called before anything that takes long.

    Args:
        out: folder that the user named, None for a new one under runs/.
        resume: whether it is to be a run already.
    """
    path = pathlib.Path("runs/new") if out is None else pathlib.Path(out)
    if resume:
        if not (path / "config.yaml").is_file():
            raise InputError(f"'{path}' is no run folder (it has no config.yaml); start the run without --resume")
    elif out is not None:
        RunFolder.check_free(path)
    with hold(path):
        pass


def next_free(parent: pathlib.Path, name: str) -> pathlib.Path:
    """Return `parent/name`, or `parent/name-2`, `-3`, ... where that is taken."""
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def environment() -> dict[str, Any]:
    """Return the versions and devices, for the record."""
    import jax  # not at the top: who reads a config needs no device

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
    """Return a config as dicts, lists and scalars."""
    if dataclasses.is_dataclass(cfg):
        return {field.name: to_plain(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}
    return [to_plain(item) for item in cfg] if isinstance(cfg, tuple) else cfg


def from_plain(config_class: type[Config] | types.UnionType, plain: Any, source: str) -> Config:
    """Return the config that `to_plain` gave; raises InputError on fields missing, unknown or of another type."""
    chosen, plain = pick_class(config_class, plain)
    fields = {field.name for field in dataclasses.fields(chosen)}
    if not isinstance(plain, dict) or set(plain) != fields:
        unfit = sorted(map(str, fields ^ set(plain))) if isinstance(plain, dict) else ["all"]
        raise InputError(f"'{source}' does not fit this version ({', '.join(unfit)} missing or unknown)")
    kinds = typing.get_type_hints(chosen)
    values: dict[str, Any] = {}
    for name, value in plain.items():
        kind = kinds[name]
        if is_config(kind):
            values[name] = from_plain(kind, value, source)
        elif not _fits(kind, value):
            raise InputError(f"'{source}': {name} is {value!r}, which this field cannot be; start a new run")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return chosen(**values)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value that was read is of a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(each, value) for each in args)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Name the fields in which two configs differ, as flags; those that the second's class lacks are left out."""
    if dataclasses.is_dataclass(first):
        names = []
        for field in dataclasses.fields(first):
            pair = getattr(first, field.name), getattr(second, field.name, getattr(first, field.name))
            names += differences(*pair, prefix=f"{prefix}{field.name.replace('_', '-')}.")
        return names
    return [] if first == second else ["--" + prefix.rstrip(".")]


def stored_by(config_class: type[Config]) -> Callable[[Sequence[str]], Config | None]:
    """Return what finds the config that a command's flags start from: that of the run that --resume continues.

    So `--resume --out FOLDER` alone goes on with the flags the run was started with.
    """

    def find(args: Sequence[str]) -> Config | None:
        outs = [word.partition("=")[2] or following for word, following in itertools.zip_longest(args, args[1:])
                if word == "--out" or word.startswith("--out=")]  # fmt: skip
        if "--resume" not in args or not outs or outs[-1] is None:
            return None
        return RunFolder(pathlib.Path(outs[-1])).config(config_class)

    return find
