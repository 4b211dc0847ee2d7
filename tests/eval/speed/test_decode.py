"""eval.decode on a tiny preset."""

import json

import pytest

from eval.decode import command
from eval.speed import decode


@pytest.mark.slow
def test_it_prints_a_table_and_one_line_of_json(capsys):
    args = ["--preset", "tiny", "--lengths", "60", "40", "--new-tokens", "2", "--rounds", "2", "--profile"]
    assert command(args) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "decode, tokens/s" in out and set(result["results"]) == {"dense", "sparse"}
    assert result["step_ratio"] > 0
    assert len(result["results"]["dense"]["step_seconds"]) == 2
    assert result["results"]["sparse"]["reads"]["tokens"] == 20
    for name, part in result["results"].items():
        assert f"{name}: a step by kernel" in out
        assert min(kernel["seconds"] for kernel in part["kernels"]) > 0
        assert max(kernel["launches"] for kernel in part["kernels"]) >= 2  # once in each layer of a step


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--lengths", "0"], "at least 1"),
        (["--methods", "dense", "dense"], "each once"),
        (["--preset", "tiny", "--keep", "2"], "keep is 2.0"),
    ],
)
def test_bad_flags_are_refused(args, message, capsys):
    assert command(args) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_the_device_is_told_at_once(capsys, monkeypatch):
    def no_device():
        raise RuntimeError("Unknown backend tpu")

    monkeypatch.setattr("jax.devices", no_device)
    monkeypatch.setattr(decode, "load_weights", lambda *_: pytest.fail("loaded"))
    assert command(["--preset", "tiny", "--lengths", "60"]) == 2
    assert "JAX finds no device" in capsys.readouterr().err
