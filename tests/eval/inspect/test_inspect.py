"""`spotlight eval inspect`: quality beside NumPy, pictures, the CSV, and what a resumed run leaves alone."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.common.cases import describe_selection, list_cases
from eval.common.flags import EvalConfig
from eval.inspect import command
from eval.inspect import run as inspect
from spotlight_jax import metrics
from spotlight_jax.attention import causal_attention
from spotlight_jax.errors import InputError
from spotlight_jax.models.decoder import apply_layer, embed_tokens
from tests.eval.tiny import MODEL, draw_tokens, model, write_inputs

GROUP, HEADS = MODEL.group, MODEL.kv_heads
SIZES = ["--window", "96", "--queries", "12", "--selection.min-tokens", "5", "--selection.dense-layers", "0"]


@pytest.fixture(autouse=True)
def own_compile_cache(monkeypatch):
    monkeypatch.setattr(inspect, "use_compile_cache", lambda: None)


def seen_by_layers(tokens):
    """Queries and keys after RoPE, and values, of every layer of a dense pass, float64."""
    found = []
    x = embed_tokens(model().params, jnp.asarray(tokens)[None], MODEL)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]

    def attend(queries, keys, values):
        return causal_attention(queries, keys, values), (queries, keys, values)

    apply = jax.jit(lambda params, x: apply_layer(params, x, positions, attend, MODEL))
    for layer in range(MODEL.layers):
        x, seen = apply(model().params[f"layer_{layer}"], x)
        found.append([np.asarray(array[0], np.float64) for array in seen])
    return found


def quality_by_hand(queries, keys, token_values, places, choose, budget):
    """`MEASURES` of each KV head and query, by sets of positions: [heads, queries, 5]."""
    rows = []
    for head in range(HEADS):
        own = queries[:, head * GROUP : (head + 1) * GROUP]
        values = []
        for place in places:
            logits = keys[: place + 1, head] @ own[place].T / np.sqrt(MODEL.head_dim)  # [seen, group]
            shares = np.exp(logits - logits.max(0))
            chosen = sorted(choose(place, budget(place)))
            dense, own_output = (
                (shares[tokens] / shares[tokens].sum(0)).T @ token_values[tokens, head]
                for tokens in (range(place + 1), chosen)
            )
            error = (np.square(own_output - dense).sum(1) / np.square(dense).sum(1)).mean()
            shares = (shares / shares.sum(0)).mean(1)
            order = sorted(range(place), key=lambda token: -logits[token].sum())
            wanted = {place, *order[: budget(place) - 1]}
            chosen = set(chosen)
            values.append(
                [
                    len(chosen & wanted) / len(chosen | wanted),
                    len(chosen & wanted) / len(wanted),
                    shares[list(chosen)].sum(),
                    shares[list(wanted)].sum(),
                    error,
                ]
            )
        rows.append(values)
    return np.array(rows)


def test_quality_is_that_of_sets_of_positions():
    tokens = draw_tokens(80, seed=7)
    cfg = EvalConfig(methods=("window", "oracle-scores"), keep=(0.25,))
    (window, oracle) = inspect.inspect_window(model(), tokens, list_cases(cfg), count=10, seed=0)
    places = [8 * number - 1 for number in range(1, 11)]
    assert metrics.spread_positions(80, 10).tolist() == places

    def budget(place):
        return min(max(20, place + 1 - int(0.75 * (place + 1))), place + 1)

    def newest(place, count):
        if count > place:
            return set(range(place + 1))
        return {0, 1, 2, 3} | set(range(place - count + 5, place + 1))

    for layer, (queries, keys, values) in enumerate(seen_by_layers(tokens)):
        each = quality_by_hand(queries, keys, values, places, newest, budget)
        expected = each.mean(axis=1)
        found = np.stack([window["by_head"][name][layer] for name in inspect.MEASURES], axis=-1)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(oracle["by_head"]["iou"][layer], 1)
        np.testing.assert_allclose(oracle["by_head"]["mass"][layer], expected[:, 3], atol=1e-4)
    assert window["tokens_read"] == pytest.approx(np.mean([budget(place) for place in places]))
    assert window["sparse_layers"] == [2]  # of three, 0 and 1 being dense by default
    queries_of = {(0, 16): [0, 1], (16, 32): [2, 3], (32, 48): [4, 5], (48, 64): [6, 7], (64, 80): [8, 9]}
    for bucket, ((start, end), own) in zip(window["by_position"], queries_of.items(), strict=True):
        assert (bucket["from"], bucket["to"], bucket["queries"]) == (start, end, 2)
        found = [bucket[name] for name in inspect.MEASURES]
        np.testing.assert_allclose(found, each[:, own].mean(axis=(0, 1)), atol=1e-4)  # of the last layer alone
    row = 2 * MODEL.head_dim * 4 * HEADS
    seen = np.mean(places) + 1
    assert window["bytes_read"] == pytest.approx((2 * seen + window["tokens_read"]) * row)


@pytest.mark.parametrize("name", ["window", "oracle-mass"])
def test_a_tail_reads_the_newest_as_well_and_has_less_error(name):
    cfg = EvalConfig(methods=(name, f"{name}+tail"), keep=(0.1, 1.0))
    plain, plain_all, tailed, tailed_all = inspect.inspect_window(
        model(), draw_tokens(200, seed=7), list_cases(cfg), count=20, seed=0
    )
    assert plain["estimated"] == 0 < tailed["estimated"] < 1 - tailed["by_head"]["mass"][2].mean() + 0.3
    for layer in range(MODEL.layers):
        for row in (plain_all, tailed_all):
            np.testing.assert_allclose(row["by_head"]["error"][layer], 0, atol=1e-8)
        assert (tailed["by_head"]["mass"][layer] > plain["by_head"]["mass"][layer]).all()
        np.testing.assert_array_equal(tailed["by_head"]["iou"][layer], plain["by_head"]["iou"][layer])
    assert np.mean(tailed["by_head"]["error"][2]) < 0.9 * np.mean(plain["by_head"]["error"][2])
    assert tailed["tokens_read"] > plain["tokens_read"] and tailed["index_bytes"] > plain["index_bytes"]
    assert tailed_all["estimated"] == 0


def test_a_run_writes_rows_heads_and_pictures_and_resumes(tmp_path, capsys, monkeypatch):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run")]
    flags += ["--methods", "dense", "oracle-scores", "spotlight", "magicpig", "--keep", "0.1", "0.2"]
    assert command(flags) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["results"]
    assert len(rows) == (2 + 2 + 1) * 3  # dense selects nothing; two texts and both together
    assert "spotlight: the 4 worst heads" in out  # two KV heads of two sparse layers
    for row in rows:
        assert 0 < row["mass"] <= 1 and "by_head" not in row
        if row["method"] == "oracle-scores":
            assert row["iou"] == 1 and row["mass"] == row["oracle_mass"]
        counts = [bucket["queries"] for bucket in row["by_position"]]
        assert counts == 6 * [4 if row["text"] == "all texts" else 2]  # twelve queries of each text's window
        for name in inspect.MEASURES:
            parts = [bucket[name] for bucket in row["by_position"]]
            assert np.average(parts, weights=counts) == pytest.approx(row[name], abs=2e-5)
    with (tmp_path / "run" / "heads.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == MODEL.layers * (4 * MODEL.kv_heads + MODEL.q_heads)
    own = [line for line in lines if (line["method"], line["keep"]) == ("spotlight", "0.2")]
    sparse = [float(line["iou"]) for line in own if line["read_densely"] == "0"]
    total = next(row for row in rows if (row["method"], row["keep"], row["text"]) == ("spotlight", 0.2, "all texts"))
    assert np.mean(sparse) == pytest.approx(total["iou"], abs=1e-4)
    for name in ("iou.png", "mass.png", "mass-6-heads.png", "error.png", "by_position.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5_000

    def refuse(*args, **kwargs):
        raise AssertionError("measured twice")

    monkeypatch.setattr(inspect, "inspect_window", refuse)
    assert command([*flags, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == rows


def test_the_worst_heads_are_those_of_a_selector_wherever_it_lies(tmp_path, capsys):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run")]
    name = f"spotlight@{tmp_path / 'selector'}"
    assert command([*flags, "--methods", "window", name, "--keep", "0.1"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("spotlight: the") for line in shown)  # people read a short name, and whose it is
    assert f"spotlight: {tmp_path / 'selector'}" in shown and sum(name in line for line in shown) == 0
    assert {row["method"] for row in json.loads(last)["results"]} == {"window", name}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--queries", "97"], "no more queries"),
        (["--methods", "dense"], "dense selects nothing"),
        (["--window", "513", "--queries", "5"], "context of 512"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, more, message):
    flags = [*write_inputs(tmp_path), *SIZES, "--out", str(tmp_path / "run"), *more]
    assert command(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_resuming_needs_no_flag_but_the_folder_and_refuses_others(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert command([*write_inputs(tmp_path), *SIZES, "--methods", "spotlight", "--seed", "3", *out]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert command(["--resume", *out]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == rows
    assert command(["--resume", *out, "--methods", "spotlight", "window"]) == 0  # another one may be added
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["results"]) == 2 * len(rows)
    assert command(["--resume", *out, "--seed", "0"]) == 2  # the default, but not what the run has
    assert "was started with other flags (--seed" in capsys.readouterr().err


def test_panels_say_what_each_method_was_asked_to_read():
    cfg = EvalConfig(methods=("dense", "window", "magicpig"), keep=(0.02,))
    told = [describe_selection(case.part) for case in list_cases(cfg)]
    assert told == ["", "\nkeep 0.02, bare", "\nas published"]


def test_the_model_is_the_one_that_the_selector_was_trained_for(tmp_path, capsys):
    flags = write_inputs(tmp_path)[2:]  # without --model
    args = [*flags, "--methods", "spotlight", *SIZES, "--out", str(tmp_path / "run")]
    assert command(args) == 0
    assert "random:tiny, 96 tokens" in capsys.readouterr().out
    assert "model: random:tiny" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_model_that_the_selector_was_not_trained_for_is_said(tmp_path, capsys):
    flags = write_inputs(tmp_path)
    config = tmp_path / "selector" / "config.json"
    config.write_text(config.read_text().replace("random:tiny", "maker/model"))
    (tmp_path / "selector" / "manifest.json").unlink()  # as who edits a selector is told to
    assert command([*flags, "--methods", "spotlight", *SIZES, "--out", str(tmp_path / "run")]) == 0
    told = f"selector '{tmp_path / 'selector'}' was trained for maker/model, and is used with random:tiny\n"
    assert capsys.readouterr().err.startswith(told)


def test_a_window_beyond_the_positions_that_a_selector_covers_gets_one_line(tmp_path, capsys):
    flags = write_inputs(tmp_path)
    config = tmp_path / "selector" / "config.json"
    fields = json.loads(config.read_text())
    for positions, count in ((96, 0), (95, 1)):  # the window has 96 tokens
        config.write_text(json.dumps(fields | {"positions": positions}))
        (tmp_path / "selector" / "manifest.json").unlink(missing_ok=True)
        args = [*flags, "--methods", "spotlight", *SIZES, "--out", str(tmp_path / f"run{positions}")]
        assert command(args) == 0
        assert capsys.readouterr().err.count("was fitted to positions up to 95") == count


def test_a_model_whose_queries_and_keys_are_not_finite_is_refused():
    whole = model()
    broken = dataclasses.replace(whole, params=jax.tree.map(lambda leaf: leaf * np.nan, whole.params))
    cases = list_cases(EvalConfig(model="random:tiny", methods=("window",)))
    with pytest.raises(InputError, match="queries or keys are not finite"):
        inspect.inspect_window(broken, np.arange(32, dtype=np.int32), cases, 4, 0)
