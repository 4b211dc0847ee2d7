"""train.ablate: variants side by side are the runs they would be alone."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from spotlight_jax import runs
from spotlight_jax.errors import InputError
from tests.train.conftest import WINDOW
from train import ablate, loop
from train.config import LayerwiseConfig
from train.trainer import Trainer

SMALL = {
    "hash.code_bits": 32, "ranking.queries": 16, "ranking.queries_at_once": 16,
    "measure.queries": 8, "measure.dense_layers": (0,),
}  # fmt: skip
NETWORKS = {
    "hash.form": "asymmetric", "hash.code_bits": 64, "hash.hidden": 8,
    "ranking.loss": "pairs", "ranking.tops": 8, "ranking.others": 16, "ranking.always_top": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch, inputs):
    """Flags of an ablation of small variants, some of them on windows of their own."""
    variants = {
        "first": SMALL,
        "second": SMALL | NETWORKS,
        "shorter": SMALL | {"data.window": WINDOW // 2, "steps": 2},
        "reseeded": SMALL | {"seed": 1, "data.seed": 1, "steps": 2},
        "copied": SMALL | {"data.copies": 0.5, "steps": 2},
    }
    monkeypatch.setattr(ablate, "VARIANTS", variants)
    monkeypatch.setattr(ablate, "use_compile_cache", lambda: None)
    texts = {"model": str(inputs.model), "train": (str(inputs.tokens),), "held_out": ()}
    return {**texts, "held_out_windows": 2, "steps": 4, "window": WINDOW}


@pytest.mark.slow
def test_a_variant_is_the_run_it_would_be_alone(small, tmp_path, capsys):
    cfg = ablate.AblateConfig(out=str(tmp_path / "all"), **small)
    rows = ablate.main(cfg)["results"]
    assert [row["variant"] for row in rows] == ["first", "second", "shorter", "reseeded", "copied"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == rows
    for name in ("first", "second", "reseeded", "copied"):
        alone = ablate.variant_config(name, cfg)
        loop.train(dataclasses.replace(alone, out=str(tmp_path / name)))
        one, other = (
            load_file(folder / "selector" / "selector.safetensors")
            for folder in (tmp_path / "all" / name, tmp_path / name)
        )
        assert one.keys() == other.keys()
        for leaf in one:
            np.testing.assert_allclose(one[leaf], other[leaf], rtol=1e-6, atol=1e-7)
    for file in ("ablation.md", "ablation.png", "ablation.json"):
        assert (tmp_path / "all" / file).stat().st_size > 0


@pytest.mark.slow
def test_finished_variants_are_not_trained_again_and_take_perplexities(small, tmp_path, capsys):
    out = tmp_path / "all"
    ablate.main(ablate.AblateConfig(out=str(out), variants=("first",), **small))
    finished = (out / "first" / "selector" / "selector.safetensors").stat().st_mtime_ns
    (tmp_path / "ppl").mkdir()
    own, everywhere = {"method": f"spotlight@{out / 'first'}"}, {"text": "all texts"}
    results = [
        {"method": "oracle-scores", "keep": 0.02, "setting": "bare", "ppl": 2.0} | everywhere,
        {"keep": 0.02, "setting": "bare", "ppl": 3.25} | own | everywhere,
        {"keep": 0.1, "setting": "sinks 4 + recent 64", "ppl": 4.5} | own | everywhere,
    ]
    (tmp_path / "ppl" / "summary.json").write_text(json.dumps({"eval": "perplexity", "results": results}))
    cfg = ablate.AblateConfig(
        out=str(out), resume=True, variants=("first", "second"), perplexity=(str(tmp_path / "ppl"),), **small
    )
    rows = ablate.main(cfg)["results"]
    assert rows[0]["ppl_0.02"] == 3.25 and rows[0]["ppl_sinks_0.1"] == 4.5 and "ppl_0.02" not in rows[1]
    assert (out / "first" / "selector" / "selector.safetensors").stat().st_mtime_ns == finished
    assert (out / "second" / "summary.json").is_file()


def test_every_variant_is_a_run_that_can_be_started():
    for name in ablate.VARIANTS:
        assert isinstance(ablate.variant_config(name, ablate.AblateConfig()), LayerwiseConfig)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"variants": ("papr",)}, "did you mean 'paper'"), ({"resume": True}, "add --out FOLDER")],
)
def test_bad_flags_are_named(fields, words):
    with pytest.raises(InputError, match=words):
        ablate.AblateConfig(**fields)


@pytest.mark.slow
def test_an_evaluation_that_is_not_finished_is_refused(small, tmp_path):
    cfg = ablate.AblateConfig(out=str(tmp_path / "all"), variants=("first",), perplexity=(str(tmp_path),), **small)
    with pytest.raises(InputError, match="no finished evaluation"):
        ablate.main(cfg)


@pytest.mark.slow
def test_a_stopped_ablation_measures_what_is_trained_and_begins_it_anew(small, tmp_path, monkeypatch):
    out, take_step = tmp_path / "all", Trainer.take_step

    def interrupted(trainer, captured):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer, captured)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        ablate.main(ablate.AblateConfig(out=str(out), variants=("first",), **small))
    assert stopped.value.code == 128 + signal.SIGTERM
    row = json.loads((out / "ablation.json").read_text())[0]
    assert row["steps"] == 2 and not row["is_finished"]
    monkeypatch.setattr(Trainer, "take_step", take_step)
    rows = ablate.main(ablate.AblateConfig(out=str(out), variants=("first",), resume=True, **small))["results"]
    assert rows[0]["steps"] == 4 and rows[0]["is_finished"]


def test_what_the_end_of_an_ablation_needs_is_looked_at_first(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "open_inputs", lambda *args: pytest.fail("began"))
    out = tmp_path / "all"
    with pytest.raises(InputError, match="is no finished evaluation"):
        ablate.main(ablate.AblateConfig(out=str(out), perplexity=(str(tmp_path / "none"),), **small))
    with pytest.raises(InputError, match="is no run folder"):
        ablate.main(ablate.AblateConfig(out=str(out), resume=True, **small))
    runs.RunFolder.create(out, ablate.AblateConfig(out=str(out), **small))
    (out / "first").mkdir()
    (out / "first" / "ablation.json").write_text("{")
    with pytest.raises(InputError, match=r"ablation.json' is damaged: .* remove it to make it again"):
        ablate.main(ablate.AblateConfig(out=str(out), resume=True, **small))
    (out / "first" / "ablation.json").unlink()
    with runs.hold(out), pytest.raises(InputError, match=f"is being written by process {os.getpid()}"):
        ablate.main(ablate.AblateConfig(out=str(out), resume=True, **small))


def test_an_ablation_goes_on_with_the_flags_it_was_started_with(small, tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "all", []
    runs.RunFolder.create(out, ablate.AblateConfig(out=str(out), **small))
    monkeypatch.setattr(ablate, "_train_together", lambda cfg, *_: seen.append(cfg))
    monkeypatch.setattr(ablate, "plot_ablation", lambda *_: None)
    args = ["--resume", "--out", str(out)]
    assert ablate.command([*args, "--variants", "first"]) == 0
    assert seen[0].steps == small["steps"] and seen[0].train == small["train"] and seen[0].variants == ("first",)
    for flag, value in (("--steps", "200"), ("--seed", "1")):  # 200: what every new ablation takes
        assert ablate.command([*args, flag, value]) == 2
        assert f"was started with other flags ({flag})" in capsys.readouterr().err
    assert len(seen) == 1
