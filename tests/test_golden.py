"""Outputs are as they were recorded; what a training run leaves is in tests/train/test_golden.py."""

import numpy as np
import pytest

from tests.golden import __main__ as command
from tests.golden import outputs, recorded

SLOW = ("texts", "log-probabilities", "rows")
EXPECTED, MACHINE = recorded.read(recorded.FILE)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow if part in SLOW else ())
        for part in outputs.PARTS
        if part != "training"
    ],
)
def test_outputs_are_as_recorded(part):
    expected = {name: array for name, array in EXPECTED.items() if name.split("/")[0] == part}
    assert expected and recorded.compare(outputs.compute(part), expected) == [], f"recorded on {MACHINE}"


def test_integers_that_follow_from_integers_have_no_tolerance():
    names = [name for name in EXPECTED if outputs.rule_of(name) == outputs.Rule()]
    assert {name.split("/")[0] for name in names} == {"texts", "selections", "rows"}
    assert all(np.issubdtype(EXPECTED[name].dtype, np.integer) for name in names if not name.startswith("rows/"))


def test_what_differs_is_named():
    name, other = "selections/mask", "log-probabilities/dense"
    expected = {name: EXPECTED[name], other: EXPECTED[other]}
    found = {
        name: EXPECTED[name] ^ (np.arange(len(EXPECTED[name])) == 5),
        other: EXPECTED[other] * np.float32(1 + 1e-6),
    }
    assert [line.split(" ", 1)[0] for line in recorded.compare(found, expected)] == [name]
    assert len(recorded.compare(found, expected, is_exact=True)) == 2
    assert recorded.compare({}, expected)[0].endswith("was not computed")
    assert recorded.compare({"new": np.zeros(2)} | expected, expected) == ["new is not recorded"]
    assert "recorded was" in recorded.compare({name: EXPECTED[name][:-1]}, {name: EXPECTED[name]})[0]


def test_bits_are_compared_on_the_machine_that_recorded_them_alone(monkeypatch, capsys):
    monkeypatch.setattr(recorded, "describe_machine", lambda: MACHINE | {"jax": "0"})
    with pytest.raises(SystemExit):
        command.main(["--exact"])
    assert "another jax" in capsys.readouterr().err
