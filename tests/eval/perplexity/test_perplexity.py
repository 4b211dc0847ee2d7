"""`spotlight eval perplexity` on a tiny model: its arithmetic, its folder, its errors."""

import json
import math

import numpy as np
import pytest

from eval.model import scores
from eval.model.scores import SequenceScores
from eval.perplexity import command
from eval.perplexity import run as perplexity
from eval.perplexity.copy_text import CopyConfig, copy_texts
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import open_windows, read_windows
from spotlight_jax.errors import InputError
from spotlight_jax.selector.checkpoint import load_selector, save_selector
from tests.eval.tiny import make_selector, write_inputs

SIZES = ["--window", "96", "--selection.min-tokens", "5", "--selection.dense-layers", "0"]


@pytest.fixture(autouse=True)
def own_compile_cache(monkeypatch):
    monkeypatch.setattr(perplexity, "use_compile_cache", lambda: None)


def run(args, capsys):
    assert command(args) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1])["results"], captured


def passed(log_probs, tokens):
    size = len(log_probs)
    reads = np.arange(size + 1, dtype=np.float32)
    best, is_greedy = np.zeros(size + 1, np.int32), np.zeros(size, bool)
    return SequenceScores(best, np.asarray(log_probs), is_greedy, reads + tokens, reads * 100, reads * 10, reads / 4)


def test_perplexities_are_means_over_documents_and_over_tokens():
    passes = [passed([-1.0, -2.0, -3.0], 5), passed([-1.0, -1.0, -4.0], 7)]
    row = perplexity.measure(passes, first_scored=1)
    assert row["ppl"] == pytest.approx((math.exp(2) + math.exp(2)) / 2)
    assert row["tokens_read"] == pytest.approx(((0 + 1 + 2) / 3 + 5 + (0 + 1 + 2) / 3 + 7) / 2)
    assert (row["bytes_read"], row["index_bytes"], row["estimated"]) == (100, 10, 0.25)
    # tokens 2 and 3 alone: losses 2, 3 and 1, 4, read by the queries at 1 and 2
    row = perplexity.measure(passes, first_scored=2)
    assert row["ppl"] == pytest.approx(math.exp(2.5))
    assert (row["tokens_scored"], row["bytes_read"]) == (4, 150)
    other = perplexity.measure([passed([-1.0], 0)], first_scored=1)
    both = perplexity.combine([row, other])
    assert both["ppl"] == pytest.approx((2 * math.exp(2.5) + math.e) / 3)
    assert both["ppl_pooled"] == pytest.approx(math.exp((4 * 2.5 + 1) / 5))
    assert both["documents"] == 3


def test_perplexity_by_position_is_that_of_the_tokens_which_its_queries_predict():
    losses = np.random.default_rng(0).uniform(0.1, 3, (2, 8))  # of tokens 1 to 8, by queries at 0 to 7 of nine
    row = perplexity.measure([passed(-own, 5) for own in losses], first_scored=4)  # token 4 is that of query 3
    expected = [(2, 4, losses[:, 3]), (4, 6, losses[:, 4:6]), (6, 8, losses[:, 6:])]
    for bucket, (start, end, own) in zip(row["by_position"], expected, strict=True):
        assert (bucket["from"], bucket["to"], bucket["queries"]) == (start, end, own.size)
        assert bucket["ppl_pooled"] == pytest.approx(math.exp(own.mean()))
    more = np.random.default_rng(1).uniform(0.1, 3, (1, 8))
    both = perplexity.combine([row, perplexity.measure([passed(-own, 5) for own in more], first_scored=4)])
    last = both["by_position"][-1]
    assert last["queries"] == 6 and last["loss"] == pytest.approx(np.concatenate([losses, more])[:, 6:].mean())
    for whole in (row, both):
        counts, parts = zip(*((bucket["queries"], bucket["loss"]) for bucket in whole["by_position"]), strict=True)
        assert np.average(parts, weights=counts) == pytest.approx(math.log(whole["ppl_pooled"]))


def test_a_run_has_a_row_for_every_method_share_setting_and_text(tmp_path, capsys, monkeypatch):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run")]
    flags += ["--methods", "dense", "spotlight", "window", "--keep", "0.1", "1", "--settings", "bare", "sinks"]
    rows, captured = run(flags, capsys)
    texts = [str(tmp_path / "one.npy"), str(tmp_path / "two.npy"), "all texts"]
    assert len(rows) == (1 + 2 * 2 * 2) * 3
    found = {(row["method"], row["keep"], row["setting"], row["text"]): row for row in rows}
    for text in texts:
        dense = found["dense", 1.0, "everything", text]
        full = found["spotlight", 1.0, "bare", text]
        assert full["ppl"] == pytest.approx(dense["ppl"], rel=1e-5)
        assert full["bytes_read"] == dense["bytes_read"] + full["index_bytes"]
        sparse = found["spotlight", 0.1, "bare", text]
        assert sparse["ppl"] != pytest.approx(dense["ppl"], rel=1e-5)
        assert sparse["tokens_read"] < 12 and dense["tokens_read"] == 48  # of queries at 0 to 94
    for name in ("perplexity.png", "by_position.png"):
        assert "0.1" in captured.out and (tmp_path / "run" / name).stat().st_size > 10_000

    def refuse(*args, **kwargs):
        raise AssertionError("measured twice")

    monkeypatch.setattr(perplexity, "score_sequence", refuse)
    assert run([*flags, "--resume"], capsys)[0] == rows


def test_an_interrupted_run_measures_only_what_is_left(tmp_path, capsys, monkeypatch):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run"), "--methods", "dense", "window"]
    whole, _ = run(flags, capsys)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:3]) + "\n")
    calls = []
    real = perplexity.score_sequence
    monkeypatch.setattr(perplexity, "score_sequence", lambda *args: calls.append(args[2].name) or real(*args))
    again, captured = run([*flags, "--resume"], capsys)
    assert calls == ["window", "window"] and again == whole  # two windows of the second text
    assert "3 of 4 parts were finished before" in captured.err


def test_windows_are_those_that_training_measures_on(tmp_path):
    write_inputs(tmp_path)
    one, two = str(tmp_path / "one.npy"), str(tmp_path / "two.npy")
    shared = {"window": 96, "held_out_windows": 3}
    training = open_windows(DataConfig(train=(two,), held_out=(one,), **shared), None, 320)
    np.testing.assert_array_equal(read_windows(DataConfig(train=(one,), **shared), None, 320)[one], training.held_out)
    few = read_windows(DataConfig(train=(one, two), window=300, held_out_windows=9), None, 320)
    assert {name: rows.shape for name, rows in few.items()} == {one: (2, 300), two: (2, 300)}  # 700 tokens each


def test_the_copy_test_scores_the_second_copy_alone(tmp_path, capsys):
    flags = [*write_inputs(tmp_path), "--copy-test", "--copy.passage", "40", "--copy.filler", "30"]
    rows, _ = run([*flags, "--methods", "dense", "--out", str(tmp_path / "run")], capsys)
    assert {row["tokens_scored"] for row in rows} == {2 * 39, 4 * 39}
    assert rows[0]["tokens_read"] == np.mean(np.arange(71, 110))  # queries at 70 to 108 predict tokens 71 to 109


def test_a_copy_text_is_a_passage_another_text_and_the_passage_again():
    windows = {"a": np.arange(20).reshape(2, 10), "b": np.arange(100, 110).reshape(1, 10)}
    texts = copy_texts({name: rows.astype(np.int32) for name, rows in windows.items()}, CopyConfig(4, 3))
    assert texts["a"].tolist() == [
        [0, 1, 2, 3, 107, 108, 109, 0, 1, 2, 3],
        [10, 11, 12, 13, 107, 108, 109, 10, 11, 12, 13],
    ]
    assert texts["b"].tolist() == [[100, 101, 102, 103, 7, 8, 9, 100, 101, 102, 103]]
    alone = copy_texts({"a": windows["a"].astype(np.int32)}, CopyConfig(4, 3))
    assert alone["a"][0].tolist() == [0, 1, 2, 3, 17, 18, 19, 0, 1, 2, 3]
    with pytest.raises(InputError, match="no other text"):
        copy_texts({"b": windows["b"].astype(np.int32)}, CopyConfig(4, 3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "oracle"], "method 'oracle' is called 'oracle-scores'"),
        (["--methods", "orakle-mass"], "did you mean 'oracle-mass'"),
        (["--window", "600"], "passes the model's context of 512"),
        (["--copy-test"], "a copy text has 4096 tokens"),
        (["--texts", "EMPTY"], "is empty"),
        (["--texts", "TEXT"], "needs a tokenizer"),
        (["--selector", "nowhere"], "is no selector"),
        (["--windows-per-text", "0"], "windows_per_text is 0"),
        (["--copy.passage", "1"], "passage 1"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, more, message):
    flags = write_inputs(tmp_path)
    for name, content in (("EMPTY", ""), ("TEXT", "words")):
        (tmp_path / f"{name}.txt").write_text(content)
        more = [str(tmp_path / f"{name}.txt") if flag == name else flag for flag in more]
    assert command([*flags, *SIZES, "--out", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_selector_of_another_model_is_told(tmp_path, capsys):
    flags = write_inputs(tmp_path)
    flags[1] = "random:smollm2-135m"
    assert command([*flags, "--out", str(tmp_path / "run")]) == 2
    assert "layers 3 instead of 30" in capsys.readouterr().err


def test_selectors_are_opened_once_however_many_parts_read_by_them(tmp_path, capsys, monkeypatch):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run")]
    save_selector(tmp_path / "other", make_selector(seed=2), "card")
    opened = []
    monkeypatch.setattr("eval.model.load.load_selector", lambda folder: opened.append(folder) or load_selector(folder))
    monkeypatch.setattr("eval.methods.opening.load_selector", lambda *args: pytest.fail("opened again"))
    other = f"spotlight@{tmp_path / 'other'}"
    rows, _ = run([*flags, "--methods", "spotlight", other, "--keep", "0.1", "0.2"], capsys)
    assert opened == [str(tmp_path / "selector"), str(tmp_path / "other")]
    found = {row["method"]: row["ppl"] for row in rows if row["keep"] == 0.1 and row["text"] == "all texts"}
    assert found["spotlight"] != found[other]  # each by its own


def test_a_selector_behind_a_method_that_does_not_fit_is_told_before_weights_are_read(tmp_path, capsys, monkeypatch):
    flags = write_inputs(tmp_path)
    flags[1] = "random:smollm2-135m"
    flags[flags.index("--selector") : flags.index("--selector") + 2] = []
    monkeypatch.setattr("eval.model.load.load_weights", lambda *args: pytest.fail("weights were read"))
    name = f"spotlight@{tmp_path / 'selector'}"
    assert command([*flags, "--methods", "dense", name, "--out", str(tmp_path / "run")]) == 2
    assert "layers 3 instead of 30" in capsys.readouterr().err


def test_a_loss_whose_perplexity_is_past_any_number_is_refused():
    assert scores.perplexity_of(np.log(8.0)) == pytest.approx(8)
    assert scores.perplexity_of(709.0) < np.inf
    with pytest.raises(InputError, match="mean loss is 710 nats a token"):
        scores.perplexity_of(710.0)
    passed = SequenceScores(np.ones(5, np.int32), np.full(4, -800.0), np.ones(4, bool), *[np.ones(5)] * 4)
    with pytest.raises(InputError, match="mean loss is 800"):
        perplexity.measure([passed], 1)
