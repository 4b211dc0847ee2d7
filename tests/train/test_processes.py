"""Several processes train what one trains, and one continues what the others began."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from spotlight_jax.errors import InputError
from tests.train.conftest import LAYERS
from train.checkpointing import newest_step
from train.config import DistributedConfig
from train.processes import launcher

ROOT = pathlib.Path(__file__).parents[2]
KILLED_AT = 8
PROGRAM = "import sys; from train.layerwise import command; sys.exit(command(sys.argv[1:]))"
KILLED = f"""
import os, sys
from train import trainer
real = trainer.Trainer.take_step
def take_step(self, captured=None):
    if self.step == {KILLED_AT}:
        self._store.wait()  # all processes are killed at once; what they wrote by then is a matter of luck
        os._exit(9)
    return real(self, captured)
trainer.Trainer.take_step = take_step
{PROGRAM}
"""


def run_all(program, args, processes, devices, launch=None):
    """Exit codes, stdout and stderr of as many processes, each with its devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for number in range(processes):
        own = [
            "--distributed.coordinator", f"localhost:{port}", "--distributed.num-processes", str(processes),
            "--distributed.process-id", str(number), "--distributed.timeout", "100",
        ] if processes > 1 else []  # fmt: skip
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", program, *args, *own]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]


def assert_same(run, other):
    first, second = (load_file(of / "selector" / "selector.safetensors") for of in (run, other))
    assert first.keys() == second.keys()
    for name in first:  # scales of heads that are alone in their score head change no score
        if name != "weights.log_gain":
            near = 1e-3 if "tail." in name else 1e-5
            np.testing.assert_allclose(first[name], second[name], rtol=0, atol=near, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 4), (1, 8)), ((1, 8), (2, 4))], ids=["2 to 1", "1 to 2"])
def test_a_killed_run_goes_on_with_other_processes_to_the_same_selector(inputs, finished, tmp_path, before, after):
    path = tmp_path / "run"
    for code, _, err in run_all(KILLED, inputs.flags(path), *before):
        assert code == 9, err
    assert newest_step(path / "checkpoints")[0] == 5 and not (path / "selector").exists()
    ended = run_all(PROGRAM, ["--resume", "--out", str(path)], *after)
    for code, _, err in ended:
        assert code == 0, err
    assert "8 x cpu" in ended[0][2] and "resumed at step 5" in ended[0][2] and LAYERS % 8
    assert '"steps": 12' in ended[0][1].splitlines()[-1]
    for _, out, err in ended[1:]:  # the first one alone speaks (and the library that carries CPUs' sums)
        said = [line for line in (out + err).splitlines() if "[Gloo]" not in line and "warn" not in line.lower()]
        assert not [line for line in said if "training" in line or "measuring" in line or "{" in line], said
    assert_same(path, finished.path)
    rows = len((path / "metrics.jsonl").read_text().splitlines())
    assert rows == len((finished.path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),  # in an allocation, without srun
        ({"SLURM_STEP_NUM_TASKS": "2"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "ompi"),
    ],
)
def test_launchers_are_known_by_what_they_tell_their_processes(environment, name):
    assert launcher(environment) == name


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"coordinator": "host:1"}, "needs all of"),
        ({"num_processes": 2, "process_id": 0}, "needs all of"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "count from 0"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "HOST:PORT"),
    ],
)
def test_processes_that_cannot_be_are_refused(flags, told):
    with pytest.raises(InputError, match=told):
        DistributedConfig(**flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--weights", "sharded"), "4 x cpu"),
        (("--weights", "disk"), "4 x cpu"),
        (("--mesh", "model=2"), "2 x cpu, mesh model=2, windows at once: 1"),
        (("--mesh", "data=2", "model=2"), "4 x cpu, mesh data=2 model=2, windows at once: 2"),
    ],
)
def test_weights_that_lie_elsewhere_train_the_same_selector(inputs, finished, tmp_path, flags, told):
    path = tmp_path / "run"
    ((code, _, err),) = run_all(PROGRAM, inputs.flags(path, *flags), 1, 4)
    assert code == 0 and told in err, err
    assert_same(path, finished.path)
    shutil.rmtree(path)
