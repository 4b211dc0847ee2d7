"""Run folders: configs come back, nothing is overwritten, rows cut short are dropped."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import yaml

from spotlight_jax import runs
from spotlight_jax.errors import InputError
from spotlight_jax.runs import RunFolder

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
    code_bits: int = 128
    weights: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    hash_cfg: Inner = Inner()
    model: str = "maker/model"
    rate: float = 1e-3
    texts: tuple[str, ...] = ("a", "b")
    resume: bool = False
    limit: int | None = None


CFG = Outer(hash_cfg=Inner(64, (0.5, 0.25)), rate=2e-5, texts=("text: é", "no"), resume=True)


def test_a_config_comes_back_from_its_run(tmp_path):
    RunFolder.create(tmp_path / "run", CFG)
    loaded = RunFolder(tmp_path / "run").config(Outer)
    assert loaded == CFG
    assert isinstance(loaded.texts, tuple)
    assert hash(loaded) == hash(CFG)


def test_a_new_run_records_versions_and_device(tmp_path):
    RunFolder.create(tmp_path / "run", CFG)
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["devices"] == jax.device_count()


def test_an_existing_run_is_refused_and_left_alone(tmp_path):
    RunFolder.create(tmp_path / "run", CFG)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match="exists already; give another --out, or --resume"):
        RunFolder.create(tmp_path / "run", Outer())
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        RunFolder.create(tmp_path / "file", CFG)
    with pytest.raises(InputError, match="cannot write the run folder"):
        RunFolder.create(tmp_path / "file" / "run", CFG)
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", CFG).config(Outer) == CFG


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{unclosed: [", "not readable YAML"),
        (b"\xff\xfe\xff", "not readable YAML"),
        (b"- a\n- b\n", "does not fit this version"),
        (b"", "does not fit this version"),
        (b"model: m\ncolour: red\n", "colour, hash_cfg"),
    ],
)
def test_configs_that_do_not_fit_are_one_line(content, says, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        RunFolder(tmp_path).config(Outer)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is no run folder"):
        RunFolder(tmp_path).config(Outer)


def test_metrics_come_back_in_order_without_a_line_cut_short(tmp_path):
    run, rows = RunFolder(tmp_path), [{"step": step, "loss": 1 / (step + 1)} for step in range(3)]
    assert run.metrics() == []
    for row in rows:
        run.append_metrics(row)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == rows


def test_rows_from_a_step_on_are_dropped_and_written_again(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"start": True})  # a row without a step belongs to the start
    for step in (0, 5, 10, 15):
        run.append_metrics({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    run.keep_metrics_before(10)
    run.append_metrics({"step": 10, "again": True})
    assert run.metrics() == [{"start": True}, {"step": 0}, {"step": 5}, {"step": 10, "again": True}]


def test_a_summary_is_json(tmp_path):
    RunFolder(tmp_path).write_summary({"iou": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"iou": 0.5}


def test_differences_are_named_as_flags():
    other = dataclasses.replace(CFG, hash_cfg=dataclasses.replace(CFG.hash_cfg, code_bits=32), resume=False)
    assert runs.differences(CFG, other) == ["--hash-cfg.code-bits", "--resume"]
    assert runs.differences(CFG, CFG) == []


def test_the_next_free_folder_counts_up_from_2(tmp_path):
    names = []
    for _ in range(3):
        free = runs.next_free(tmp_path, "run")
        free.mkdir()
        names.append(free.name)
    assert names == ["run", "run-2", "run-3"]


HOLDER = """
import pathlib, sys
from spotlight_jax import runs
with runs.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_which_is_named_until_it_dies(tmp_path):
    path = tmp_path / "a" / "run"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"held\n"
        told = rf"is being written by process {holder.pid} on .*, which began at"
        with pytest.raises(InputError, match=told), runs.hold(path):
            pass
        holder.kill()
    with runs.hold(path):
        RunFolder.create(path, CFG)
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"), runs.hold(path):
            pass
    assert sorted(file.name for file in path.iterdir()) == ["config.yaml", "env.json", "manifest.json"]


def test_holding_leaves_nothing_where_nothing_is_written(tmp_path):
    with pytest.raises(KeyError), runs.hold(tmp_path / "a" / "b" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"is no folder|cannot write the run folder"), runs.hold(path):
            pass


def test_a_folder_whose_process_ended_before_the_config_was_written_is_free(tmp_path):
    for name in (runs.LOCK, "env.json", "config.yaml.123.partial"):
        (tmp_path / name).write_text("x")
    RunFolder.check_free(tmp_path)
    assert RunFolder.create(tmp_path, CFG).config(Outer) == CFG
    with pytest.raises(InputError, match="exists already"):
        RunFolder.check_free(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("rate", "fast"),
        ("rate", True),
        ("texts", "a"),
        ("texts", [1]),
        ("resume", "yes please"),
        ("resume", 1),
        ("limit", 1.5),
        ("hash_cfg", [1]),
    ],
)
def test_a_value_of_another_type_is_one_line_that_names_it(field, value, tmp_path):
    plain = runs.to_plain(CFG) | {field: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError, match=f"{field} is .*, which this field cannot be|does not fit this version"):
        RunFolder(tmp_path).config(Outer)


@pytest.mark.parametrize("content", ["model: 2001-99-99", "[" * 5000, "1: 2\nmodel: a"])
def test_a_config_of_anything_else_is_one_line(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"not readable YAML|does not fit this version"):
        RunFolder(tmp_path).config(Outer)


def test_where_results_cannot_go_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.check_destination(None, resume=False)
    runs.check_destination("a/b", resume=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="is no run folder"):
        runs.check_destination("a", resume=True)
    with pytest.raises(InputError, match="cannot write the run folder"):
        runs.check_destination("/proc/nope", resume=False)
    RunFolder.create(tmp_path / "run", CFG)
    with pytest.raises(InputError, match="exists already"):
        runs.check_destination("run", resume=False)
    runs.check_destination("run", resume=True)


def test_a_config_that_was_changed_after_the_run_began_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CFG)
    assert folder.config(Outer) == CFG
    changed = (folder.path / "config.yaml").read_text().replace("rate: ", "rate: 1")
    (folder.path / "config.yaml").write_text(changed)
    with pytest.raises(InputError, match=r"config.yaml is not what was written.*start a new run"):
        folder.config(Outer)
