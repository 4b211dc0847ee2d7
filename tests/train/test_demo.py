import json

import pytest

from train import demo, loop, report


@pytest.mark.slow
def test_the_prompt_ends_with_the_opening_of_the_passage_it_starts_with():
    prompt, expected = demo._long_prompt("smollm2-135m", demo.DemoConfig(prompt_tokens=700, new_tokens=20))
    opening = prompt[: prompt.index(expected)]
    assert len(opening) > 100 and expected.strip()
    assert prompt.endswith(opening) and prompt.count(opening) == 2


def test_the_demo_trains_then_generates_with_what_it_trained(tmp_path, monkeypatch, capsys):
    seen = {}

    def train(cfg):
        seen["train"] = cfg
        far = {"mass_at_length": 0.9048, "mass_lsh_at_length": 0.84453, "mass_oracle_at_length": 0.91961}
        return {"iou": 0.5, "length": 8192, "oracle": "oracle-mass", **far}

    def generate(cfg):
        seen["generate"] = cfg
        assert cfg.prompt_file[0].read_text(encoding="utf-8")
        ways = {"dense": ("once", 1.0, 700), "sparse": ("twice", 2.0, 35)}
        return {
            way: {"results": [{"text": text}], "decode_tokens_per_second": rate, "reads": {"tokens": tokens}}
            for way, (text, rate, tokens) in ways.items()
        }

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(demo.generate, "main", generate)
    out = str(tmp_path / "run")
    demo.main(demo.DemoConfig(out=out, steps=3, prompt_tokens=700, keep=0.07))
    assert seen["train"].preset == "demo" and seen["train"].steps == 3 and seen["train"].out == out
    assert str(seen["generate"].selector) == out and seen["generate"].compare
    assert seen["generate"].generation.selection.keep == 0.07
    *_, far, last = capsys.readouterr().out.splitlines()
    assert far.startswith("At the far end of 8,192 positions the selector reads 0.905 of the attention mass")
    assert far.endswith("(LSH 0.845, oracle-mass 0.920).")
    assert report.describe_far({"iou": 0.5, "length": 2048}) is None  # a window reaches it
    summary = json.loads(last)
    assert summary["iou"] == 0.5
    assert summary["demo"]["sparse"] == {"text": "twice", "tokens_per_second": 2.0, "tokens_read": 35}
