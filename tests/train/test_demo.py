import json

import pytest

from train import demo, loop


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
        return {"iou": 0.5}

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
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["iou"] == 0.5
    assert summary["demo"]["sparse"] == {"text": "twice", "tokens_per_second": 2.0, "tokens_read": 35}
