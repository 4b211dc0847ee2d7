"""eval.harness.run: a task's row from what the harness gives, and the extra that it needs."""

import sys

from eval.harness import command
from eval.harness import run as harness
from eval.harness.scorer import TaskStats


def test_a_length_that_was_not_asked_has_no_score():
    results = {"vt": {"alias": "vt", "4096,none": -1, "32768,none": 0.4}, "mcc": {"mcc,none": -1.0}}
    assert harness.summarise_task("vt", results, {})["metrics"] == {"32768": 0.4}
    assert harness.summarise_task("mcc", results, {})["score"] == -1


def test_a_group_without_a_score_has_the_mean_of_its_tasks():
    results = {"group": {"alias": "g"}, "a": {"acc,none": 0.25}, "b": {"acc,none": 0.75, "acc_stderr,none": 1.0}}
    row = harness.summarise_task("group", results, {"a": TaskStats(requests=2), "b": TaskStats(requests=3)})
    assert row["score"] == 0.5 and row["requests"] == 5


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(["--tasks", "arc_easy", "--methods", "dense"]) == 2
    assert "spotlight-jax[eval]" in capsys.readouterr().err
