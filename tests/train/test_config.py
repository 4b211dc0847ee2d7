import dataclasses

import pytest

from spotlight_jax import runs
from train import layerwise
from train.config import PRESETS


@pytest.fixture
def parse(monkeypatch):
    """Flags to the config a run gets."""

    def parse_flags(*flags):
        seen = []
        monkeypatch.setattr(layerwise, "main", seen.append)
        assert layerwise.command(list(flags)) == 0
        return seen[0]

    return parse_flags


def test_the_paper_preset_is_the_published_recipe(parse):
    got = runs.to_plain(parse("--preset", "paper"))
    assert got["steps"] == 8192 and got["steps_per_window"] == 1
    assert got["data"]["window"] == 8192
    assert got["hash"] == {
        "form": "symmetric",
        "skip": "none",
        "code_bits": 128,
        "hidden": 128,
        "code_heads": "query",
        "centre": False,
    }
    ranking = {name: got["ranking"][name] for name in got["ranking"] if name != "queries_at_once"}  # memory alone
    assert ranking == {
        "target": "query_head",
        "top_share": 0.02,
        "min_top": 1,
        "top_rule": "total",
        "queries": 1024,
        "tops": 1024,
        "others": 1024,
        "always_top": 0,
        "weighting": "uniform",
        "loss": "pairs",
        "beta": 1.0,
        "alpha": 3.0,
    }
    optimizer = {"learning_rate": 1e-3, "warmup": 0.01, "b1": 0.9, "b2": 0.98, "weight_decay": 0.1, "clip": 1.0}
    assert got["optimizer"] == optimizer | {"ema": 0.0, "gamma_start": 64.0, "gamma_end": 64.0, "anneal": 0.0}
    measured = got["measure"]
    assert (measured["per"], measured["keep"], measured["dense_layers"]) == ("query_head", 0.02, [0, 1])


@pytest.mark.parametrize("flags", [["--preset", "paper", "--steps", "7"], ["--steps", "7", "--preset=paper"]])
def test_flags_override_presets(parse, flags):
    assert parse(*flags) == dataclasses.replace(PRESETS["paper"], steps=7)


def test_flags_within_a_room_leave_the_rest_of_the_preset(parse):
    got = parse("--preset", "demo", "--ranking.queries", "64", "--data.window", "512")
    want = PRESETS["demo"]
    assert got.ranking == dataclasses.replace(want.ranking, queries=64)
    assert got.data == dataclasses.replace(want.data, window=512)
    assert got.optimizer == want.optimizer


def test_every_preset_names_itself(parse):
    assert {name: parse("--preset", name).preset for name in PRESETS} == {name: name for name in PRESETS}
    assert parse() == PRESETS["default"]
