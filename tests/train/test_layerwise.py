import collections
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from spotlight_jax import files, runs
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import config_from_hf
from spotlight_jax.models.presets import PRESETS as SHAPES
from spotlight_jax.selector.checkpoint import load_selector
from tests.models import tiny
from tests.train.conftest import LAYERS, LENGTH, NETWORKS, PAIRS, SAVE_EVERY, STEPS, WINDOW
from train import data, estimate, hidden_cache, layerwise, loop, step, trainer
from train.capture import make_mesh
from train.checkpointing import newest_step
from train.config import PRESETS
from train.trainer import Trainer

ROOT = pathlib.Path(__file__).parents[2]
KILLED_AT = 8  # steps taken: between two checkpoints, and between two measurements' rows and the last


def _params(run):
    return load_file(run / "selector" / "selector.safetensors")


def _assert_same(run, other, atol=0.0, leave_out=()):
    first, second = ({name: leaf for name, leaf in _params(of).items() if name not in leave_out} for of in (run, other))
    assert first.keys() == second.keys()
    for name in first:  # Adam makes more of what corrections of the tail differ by, where their slope is almost 0
        near = 100 * atol if "tail." in name else atol
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=near, err_msg=name)


def _rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _checkpoints(run):
    return sorted(int(folder.name) for folder in (run / "checkpoints").iterdir())


def _spawn(program, args, **environment):
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200)


def test_a_run_leaves_all_its_files_and_a_selector(finished):
    names = {path.name for path in finished.path.iterdir()}
    pictures, folders = {"curves.png", "layers.png"}, {"checkpoints", "selector"}
    assert names == {"config.yaml", "env.json", "manifest.json", "metrics.jsonl", "summary.json"} | pictures | folders
    selector = load_selector(finished.path)
    assert (selector.shape.layers, selector.shape.q_heads, selector.shape.kv_heads) == (LAYERS, 8, 2)
    assert selector.cfg.code_bits == 32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(selector.params))
    assert _checkpoints(finished.path) == [10, 12]
    assert yaml.safe_load((finished.path / "config.yaml").read_text())["steps"] == STEPS
    assert "jax" in json.loads((finished.path / "env.json").read_text())["versions"]


def test_the_last_line_is_the_summary_as_json(finished):
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert summary == json.loads((finished.path / "summary.json").read_text())
    for name in ("iou", "iou_lsh", "mass", "mass_lsh", "mass_oracle"):
        assert 0 < summary[name] <= 1
    assert summary["mass"] <= summary["mass_oracle"] + 1e-5
    assert summary["steps"] == STEPS and summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert pathlib.Path(summary["selector"]) == finished.path / "selector"


def test_hash_functions_for_a_length_are_those_of_a_run_for_that_length_alone(inputs, finished, tmp_path):
    """Sets for several lengths are trained side by side: none changes another."""
    assert layerwise.command(inputs.flags(tmp_path / "run", "--length-step", "1")) == 0
    both, alone = load_selector(finished.path), load_selector(tmp_path / "run")
    assert [most for most, _ in both.shorter] == [WINDOW] and both.positions == alone.positions == LENGTH
    assert not alone.shorter
    for one, other in zip(jax.tree.leaves(both.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(both.sets[0].stats.axes, both.sets[1].stats.axes)


def test_every_step_and_measurement_has_one_row(finished):
    rows = _rows(finished.path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "iou" in row] == [0, 4, 8, 12]


def _assert_resumes_equal(path, finished, capsys):
    assert layerwise.command(["--resume", "--out", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["steps"] == STEPS
    _assert_same(path, finished.path)
    counts = collections.Counter((row["step"], "loss" in row) for row in _rows(path))
    assert set(counts.values()) == {1}
    assert _without_times(_rows(path)) == _without_times(_rows(finished.path))


def _without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


KILLED = f"""
import os, signal, sys
from train import layerwise, trainer
take_step = trainer.Trainer.take_step
def take_or_die(self, captured=None):
    if self.step == {KILLED_AT}:
        self._store.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, captured)
trainer.Trainer.take_step = take_or_die
layerwise.command(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(inputs, finished, tmp_path, capsys):
    path = tmp_path / "run"
    ended = _spawn(KILLED, inputs.flags(path))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert _checkpoints(path) == [0, SAVE_EVERY]
    assert max(row["step"] for row in _rows(path)) > SAVE_EVERY  # to be written again, once
    _assert_resumes_equal(path, finished, capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_tells_how_to_go_on_and_resumes_bit_for_bit(
    number, inputs, finished, tmp_path, capsys, monkeypatch
):
    path, real = tmp_path / "run", Trainer.take_step

    def take_step(self, captured=None):
        if self.step == 6:
            os.kill(os.getpid(), number)
        return real(self, captured)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Trainer, "take_step", take_step)
        layerwise.command(inputs.flags(path))
    assert stopped.value.code == 128 + number
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"stopped at step 7; continue with: spotlight train --resume --out {path}"
    assert _checkpoints(path) == [5, 7]
    assert not (path / "selector").exists()
    _assert_resumes_equal(path, finished, capsys)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("when", ["__init__", "quality_by", "take_step"])
def test_a_run_that_ended_before_it_trained_is_resumed_from_the_start(
    when, inputs, finished, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "run"

    def end(*args, **more):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, when, end)
        layerwise.command(inputs.flags(path))
    assert (newest_step(path / "checkpoints")[0] == 0) == (when == "take_step")
    _assert_resumes_equal(path, finished, capsys)


def test_the_first_checkpoint_is_whole_before_the_first_step(inputs, tmp_path, monkeypatch):
    def take_step(self, captured=None):
        assert newest_step(self.folder.path / "checkpoints") == (0, {})
        raise Killed

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(Killed):
        layerwise.command(inputs.flags(tmp_path / "run"))


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_continued(finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    position = path / "checkpoints" / "12" / "position.json"
    position.write_text(position.read_text().replace("1", "2", 1))
    assert layerwise.command(["--resume", "--out", str(path)]) == 0
    out, err = capsys.readouterr()
    told = "checkpoint 12 is damaged (position.json is not what was written); taking 10"
    assert err.splitlines().count(told) == 1
    assert "before training" in out  # the row of the run's start is there after resuming
    _assert_same(path, finished.path)
    for number in ("10", "12"):
        (path / "checkpoints" / number / "state.safetensors").unlink()
    told = "checkpoint 12 is damaged (state.safetensors is missing); checkpoint 10 is damaged"
    _assert_refused(["--resume", "--out", str(path)], told, capsys)


def test_a_run_that_another_process_writes_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished.path, tmp_path / "run")
    with runs.hold(tmp_path / "run"):
        told = f"is being written by process {os.getpid()} on"
        _assert_refused(["--resume", "--out", str(tmp_path / "run")], told, capsys)


def test_a_disk_that_fails_is_one_line_with_the_command_that_goes_on(inputs, finished, tmp_path, capsys, monkeypatch):
    path, real, count = tmp_path / "my run", files.os.fsync, 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count >= 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        told = f"No space left on device; mend that, then continue with: spotlight train --resume --out '{path}'"
        _assert_refused(inputs.flags(path), told, capsys)
    _assert_resumes_equal(path, finished, capsys)


def test_a_finished_run_can_be_resumed_and_is_not_fitted_again(finished, tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(trainer, "fit", lambda *args: pytest.fail("fitted again"))
    shutil.copytree(finished.path, path)
    shutil.rmtree(path / "selector")
    _assert_resumes_equal(path, finished, capsys)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(inputs, finished, tmp_path):
    path = tmp_path / "run"
    program = "import sys; from train.layerwise import command; sys.exit(command(sys.argv[1:]))"
    ended = _spawn(program, inputs.flags(path), XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert ended.returncode == 0, ended.stderr
    assert "8 x cpu" in ended.stderr and LAYERS % 8
    _assert_same(path, finished.path, atol=1e-5, leave_out=("weights.log_gain",))
    gains, expected = (_params(of)["weights.log_gain"] for of in (path, finished.path))
    members = _params(path)["stats.members"] > 0
    is_alone = (members & (members.sum(-1, keepdims=True) == 1)).any(2).reshape(gains.shape)
    assert is_alone.any() and not is_alone.all()
    np.testing.assert_allclose(gains[~is_alone], expected[~is_alone], rtol=0, atol=1e-5)  # others change no score


@pytest.mark.parametrize("windows_on_disk", [100, 2])  # all six, and three fillings
def test_hidden_states_on_disk_give_what_streaming_gives(inputs, finished, tmp_path, windows_on_disk):
    width = config_from_hf(json.loads((inputs.model / "config.json").read_text())).embed
    gib = (windows_on_disk + 0.5) * 2 * LAYERS * WINDOW * width * 4 / hidden_cache.GIB  # each window at two lengths
    more = ["--cache-dir", str(tmp_path / "cache"), "--cache-gib", f"{gib:.12f}"]
    assert layerwise.command(inputs.flags(tmp_path / "run", *more)) == 0
    assert len(list((tmp_path / "cache").glob("*.npy"))) == min(windows_on_disk, STEPS // 2)
    _assert_same(tmp_path / "run", finished.path)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    inputs, tmp_path, capsys, monkeypatch
):
    path, real = tmp_path / "run", Trainer.take_step

    def take_step(self, captured=None):
        if self.step == 9:  # whose state the next checkpoint would hold
            weights = self.state.params.weights
            weights = weights.replace(bit_weights=weights.bit_weights.at[1].set(jnp.nan))
            self.state = self.state.replace(params=self.state.params.replace(weights=weights))
        return real(self, captured)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert layerwise.command(inputs.flags(path)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("train.layerwise: the loss of layer_1 (up to 64 tokens) is nan")
    assert "checkpoint 5 is kept" in told
    assert _checkpoints(path) == [0, 5]
    assert not (path / "selector").exists()


def test_a_state_that_is_no_number_is_neither_saved_nor_exported(inputs, tmp_path, capsys, monkeypatch):
    path, real = tmp_path / "run", Trainer.take_step

    def take_step(self, captured=None):
        report = real(self, captured)
        if self.step == STEPS:  # the last one: no later loss shows it
            spoiled = jax.tree.map(lambda leaf: leaf * jnp.inf, self.state.params.weights)
            self.state = self.state.replace(params=self.state.params.replace(weights=spoiled))
        return report

    monkeypatch.setattr(Trainer, "take_step", take_step)
    told = "the hash functions are not finite after step 12; checkpoint 10 is kept"
    _assert_refused(inputs.flags(path), told, capsys)
    assert 12 not in _checkpoints(path) and not (path / "selector").exists()


def test_a_model_that_gives_no_numbers_is_blamed_for_it(inputs, tmp_path, capsys, monkeypatch):
    real = data.load_weights

    def load_weights(source, dtype, placement=None):
        cfg, params = real(source, dtype, placement)
        return cfg, params | {"layer_1": jax.tree.map(lambda leaf: leaf * jnp.inf, params["layer_1"])}

    monkeypatch.setattr(data, "load_weights", load_weights)
    _assert_refused(inputs.flags(tmp_path / "run"), "the model gives keys or queries that are not finite", capsys)


def test_a_loss_that_is_no_number_names_what_is_at_fault():
    def told(flags=None, is_input_finite=True):
        nan, fine = np.full(SHAPES["tiny"].layers, np.nan), np.full(SHAPES["tiny"].layers, is_input_finite)
        report = step.StepReport(jnp.asarray(nan), jnp.asarray(nan), jnp.asarray(nan), jnp.asarray(fine))
        cfg = dataclasses.replace(PRESETS["default"], **(flags or {}))
        run = estimate.Plan(cfg, SHAPES["tiny"], np.dtype("float32"), (64,), make_mesh(), disk=None)
        with pytest.raises(InputError) as caught:
            trainer.check_finite(report, run, step=3)
        return str(caught.value)

    assert "the model itself gives keys or queries" in told(is_input_finite=False)
    ranking = dataclasses.replace(PRESETS["default"].ranking, softness=1e30)
    assert "start again with --ranking.softness nearer to what the preset has" in told({"ranking": ranking})
    assert "learning-rate" not in told({"ranking": ranking}) + told(is_input_finite=False)
    assert "lower --optimizer.learning-rate" in told()


@pytest.mark.parametrize("where", [(), ("--weights", "host")])
def test_a_dry_run_tells_memory_and_time_and_writes_nothing(where, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "fit", lambda *args: pytest.fail("fitted for nothing"))
    assert layerwise.command(inputs.flags(tmp_path / "run", "--dry-run", *where)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("memory") for line in lines) and any(line.startswith("time") for line in lines)
    told = json.loads(lines[-1])
    assert told["dry_run"] and told["step_temporary_bytes"] > 0 and told["seconds_per_step"] > 0
    assert told["eta_seconds"] == pytest.approx(told["seconds_per_step"] * STEPS, abs=0.1)
    assert list(tmp_path.iterdir()) == []


def _assert_refused(flags, told, capsys):
    assert layerwise.command(flags) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("train.layerwise: ") and told in last, err
    assert out == "" and "Traceback" not in err


BAD = {
    "unknown flag": (["--stps", "3"], "unknown flag '--stps'; did you mean '--steps'?"),
    "unknown flag of a room": (["--ranking.querys", "3"], "did you mean '--ranking.queries'?"),
    "unknown value": (["--hash.form", "symetric"], "did you mean 'symmetric'?"),
    "unknown preset": (["--preset", "papr"], "did you mean 'paper'?"),
    "window past the context": (
        ["--data.window", "512", "--length", "context"],
        "--data.window 512 is more than the 256 tokens",
    ),
    "text shorter than a window": (["--data.train", "short.npy"], "short.npy"),
    "no such text": (["--data.train", "nothing.npy"], "nothing.npy"),
    "more queries than tokens": (["--ranking.queries", "128"], "ranking.queries is 128, more than the 64 tokens"),
    "identities between unequal widths": (
        ["--hash.form", "symmetric", "--hash.skip", "layers"],
        "must be equal; use skip 'none' or 'rotation'",
    ),
    "missing model": (["--model", "nowhere"], "nowhere: no such model"),
    "unknown shape": (["--model", "random:tinny"], "tiny"),
    "an average that never moves": (["--optimizer.ema", "1"], "ema is 1.0; give a decay from 0 to below 1"),
    "no steps": (["--steps", "0"], "steps is 0; give at least 1"),
    "cache below one window": (["--cache-dir", "cache", "--cache-gib", "1e-9"], "over --cache-gib"),
    "nothing is kept": (["--measure.keep", "0"], "keep is 0"),
    "every layer is dense": (["--measure.dense-layers", "0", "1", "2"], "dense"),
    "tracker that is not installed": (["--track", "trackio"], "pip install 'spotlight-jax[track]'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.arange(20, dtype=np.uint16))
    flags, told = BAD[case]
    _assert_refused(inputs.flags(tmp_path / "run", *flags), told, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["short.npy"]


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_what_cannot_fit_the_memory_is_refused_before_it_is_loaded(inputs, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 10_000)
    monkeypatch.setattr(loop, "open_inputs", lambda *args: pytest.fail("loaded"))
    _assert_refused(inputs.flags(tmp_path / "run", *flags), "0.0 GiB are free; take a smaller model", capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_exists_is_refused(inputs, finished, capsys):
    before = _rows(finished.path)
    _assert_refused(inputs.flags(finished.path), "exists already; give another --out, or --resume", capsys)
    assert _rows(finished.path) == before


def test_resuming_what_cannot_be_resumed_is_refused(inputs, finished, tmp_path, capsys):
    _assert_refused(["--resume"], "--resume needs the run's folder", capsys)
    _assert_refused(["--resume", "--out", str(tmp_path / "none")], "is no run folder", capsys)
    assert not (tmp_path / "none").exists()
    told = "was started with other flags (--steps, --seed)"
    _assert_refused(["--resume", "--out", str(finished.path), "--steps", "99", "--seed", "5"], told, capsys)
    default = ["--steps", str(PRESETS["default"].steps)]  # as a preset says, but not as the run has it
    _assert_refused(["--resume", "--out", str(finished.path), *default], "other flags (--steps)", capsys)
    _assert_refused(["--resume", "--out", str(finished.path), "--preset", "demo"], "other flags (--preset)", capsys)
    shutil.copytree(finished.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    _assert_refused(["--resume", "--out", str(tmp_path / "run")], "no checkpoint to resume from", capsys)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(inputs, finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    tiny.write_folder(tmp_path / "other", tiny.CASES["llama2"] | {"max_position_embeddings": 256})
    plain = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(plain | {"model": str(tmp_path / "other")}))
    (path / "manifest.json").unlink()  # as if that were how it began
    _assert_refused(["--resume", "--out", str(path)], "checkpoint 12 is of another model", capsys)
    assert _rows(path) == _rows(finished.path)
    assert _checkpoints(path) == [10, 12]


@pytest.mark.slow
def test_networks_train_by_pairs_and_resume_bit_for_bit(inputs, tmp_path, monkeypatch):
    more, real = [*NETWORKS, *PAIRS, "--ranking.target", "both"], Trainer.take_step

    def take_step(self, captured=None):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, captured)

    assert layerwise.command(inputs.flags(tmp_path / "whole", *more)) == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "take_step", take_step)
        layerwise.command(inputs.flags(tmp_path / "stopped", *more))
    assert layerwise.command(["--resume", "--out", str(tmp_path / "stopped")]) == 0
    _assert_same(tmp_path / "stopped", tmp_path / "whole")
    selector = load_selector(tmp_path / "whole")
    assert selector.params.weights.queries.hidden_kernel.shape[1] == selector.shape.q_heads
    assert (np.asarray(selector.params.stats.scale) != 1).all()  # measured


@pytest.mark.slow
def test_codes_per_query_head_train_and_select_per_kv_head(inputs, tmp_path):
    paper = [
        "--hash.form",
        "symmetric",
        "--hash.skip",
        "none",
        "--hash.code-heads",
        "query",
        "--measure.per",
        "kv_head",
    ]
    flags = inputs.flags(tmp_path / "run", *paper)
    for target in ("kv_head", "both"):  # a group's scores are sums over one code
        assert layerwise.command([*flags, "--ranking.target", target]) == 2
    assert layerwise.command([*flags, "--ranking.target", "query_head"]) == 0
    selector = load_selector(tmp_path / "run")
    assert selector.params.weights.keys.hidden_kernel.shape[1] == selector.shape.q_heads
