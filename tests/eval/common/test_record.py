"""The record of an evaluation: parts on disk as soon as they are measured, and never measured twice."""

import dataclasses
import importlib
import json
import typing

import pytest

from eval.common.cases import list_cases
from eval.common.flags import EvalConfig
from eval.common.record import Record, file_name
from spotlight_jax.display import make_table
from spotlight_jax.errors import InputError
from spotlight_jax.runs import RunFolder

PARTS = [{"method": "lsh", "keep": keep, "text": "a"} for keep in (0.02, 0.1)]


def config(folder, **fields):
    return EvalConfig(model="random:tiny", methods=("lsh",), out=str(folder / "run"), **fields)


def test_a_resumed_run_knows_what_is_finished(tmp_path):
    with Record.open(config(tmp_path), "toy") as record:
        assert record.begin(PARTS) == PARTS
        record.add(PARTS[0], {"ppl": 3.5})
    with Record.open(config(tmp_path, resume=True, keep=(0.02, 0.1, 0.2)), "toy") as record:
        assert record.begin(PARTS) == PARTS[1:]
        assert record.row_of(PARTS[0]) == PARTS[0] | {"ppl": 3.5}
        assert record.row_of(PARTS[1]) is None


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    with Record.open(config(tmp_path), "toy") as record:
        for part in PARTS:
            record.add(part, {"ppl": 3.5})
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    with Record.open(config(tmp_path, resume=True), "toy") as record:
        assert record.begin(PARTS) == PARTS[1:]


def test_the_last_line_has_full_names_and_the_lines_above_say_what_short_ones_mean(tmp_path, capsys):
    rows = [{"method": name, "ppl": 3.5} for name in ("lsh", "spotlight@runs/a/selector", "spotlight@runs/[b]")]
    with Record.open(config(tmp_path), "toy") as record:
        assert record.finish(rows)["results"] == rows
    *shown, last = capsys.readouterr().out.splitlines()
    assert shown == ["spotlight a: runs/a/selector", "spotlight [b]: runs/[b]"]
    assert json.loads(last)["results"] == rows


def test_labels_are_names_of_files(tmp_path):
    assert file_name("window-0.1-sinks4+recent64-trec") == "window-0.1-sinks4+recent64-trec"
    labels = [f"spotlight@{folder}-0.02" for folder in ("runs/a", "/runs/a", "runs-a", "runs__a", "runs%2Fa", "../a")]
    names = [file_name(label) for label in labels]
    for name in names:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(set(names)) == len(labels)


def test_a_refused_evaluation_leaves_no_folder_unless_something_was_measured(tmp_path):
    with pytest.raises(InputError), Record.open(config(tmp_path), "toy"):
        raise InputError("no such text")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError), Record.open(config(tmp_path), "toy") as record:
        record.begin(PARTS)
        record.add(PARTS[0], {"ppl": 3.5})
        raise InputError("no such text")
    with pytest.raises(InputError), Record.open(config(tmp_path, resume=True), "toy") as record:
        assert record.begin(PARTS) == PARTS[1:]
        raise InputError("again")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_flags_and_taken_folders_are_refused(tmp_path):
    with Record.open(config(tmp_path), "toy"):
        pass
    with pytest.raises(InputError, match="--seed"):
        Record.open(config(tmp_path, resume=True, seed=1), "toy")
    with pytest.raises(InputError, match="--resume"):
        (tmp_path / "run" / "x").touch()
        Record.open(config(tmp_path), "toy")
    with pytest.raises(InputError, match="is no run folder"):
        Record.open(dataclasses.replace(config(tmp_path, resume=True), out=str(tmp_path / "none")), "toy")


def test_the_last_line_is_the_results(tmp_path, capsys):
    with Record.open(config(tmp_path), "toy") as record:
        row = record.add(PARTS[0], {"ppl": 3.5})
        record.finish([row], [make_table("title", ["method", "ppl"], [["lsh", "3.5"]])])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last["results"] == [PARTS[0] | {"ppl": 3.5}]
    assert "lsh" in out.splitlines()[4]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == last
    assert (tmp_path / "run" / "config.yaml").exists() and (tmp_path / "run" / "env.json").exists()


def test_trials_are_every_share_and_setting_and_one_of_what_has_no_budget(tmp_path):
    cfg = EvalConfig(methods=("dense", "magicpig", "window"), keep=(0.02, 512.0), settings=("bare", "sinks"))
    parts = [tuple(case.part.values()) for case in list_cases(cfg)]
    assert parts == [
        ("dense", 1.0, "everything"),
        ("magicpig", None, "as published"),
        ("window", 0.02, "bare"),
        ("window", 512, "bare"),
        ("window", 0.02, "sinks 4 + recent 64"),
        ("window", 512, "sinks 4 + recent 64"),
    ]
    last = list_cases(cfg)[-1].selection
    assert (last.budget, last.sink_tokens, last.recent_tokens, last.min_context) == (512, 4, 64, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("lhs",)}, "did you mean 'lsh'"),
        ({"methods": ("lsh", "lsh")}, "each once"),
        ({"methods": ("spotlight",)}, "--selector"),
        ({"methods": ("lsh",), "keep": ()}, "--keep"),
        ({"methods": ("lsh",), "keep": (-0.1,)}, "keep is -0.1"),
        ({"methods": ("lsh",), "keep": (40.0,), "settings": ("bare", "sinks")}, "budget 40 cannot hold"),
        ({"methods": ("lsh",), "resume": True}, "--out"),
    ],
)
def test_bad_flags_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        EvalConfig(**fields)


@pytest.mark.parametrize("name", ["perplexity", "inspect", "needle", "harness", "longbench"])
def test_other_flags_are_refused_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    module = importlib.import_module("eval.longbench.answer" if name == "longbench" else f"eval.{name}.run")
    config_class = typing.get_type_hints(module.main)["cfg"]
    more = {"harness": {"tasks": ("toy",)}}.get(name, {})
    first = config_class(model="random:tiny", methods=("dense", "window"), out=str(tmp_path / "run"), **more)
    RunFolder.create(tmp_path / "run", first)
    monkeypatch.setattr("eval.model.load.load_weights", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("eval.harness.run.open_tasks", lambda *_: None)
    monkeypatch.setattr("eval.longbench.answer.open_package", lambda name: None)
    monkeypatch.setattr("eval.longbench.answer._available", lambda cfg: ["trec"])
    monkeypatch.setattr("eval.longbench.answer.read_samples", lambda *_, **__: [])
    monkeypatch.setattr(module, "use_compile_cache", lambda: None)
    with pytest.raises(InputError, match=r"was started with other flags \(--seed\)"):
        module.main(dataclasses.replace(first, resume=True, seed=1))
