"""eval.speed on a tiny shape, and the checks that stand before its clock."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from eval.speed import checks, command, ops, timing
from eval.speed import run as speed
from spotlight_jax.kernels.table import OPS
from spotlight_jax.models.presets import PRESETS
from tests.kernels.ops import TESTED

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

SHAPE = ops.shape_of(PRESETS["tiny"], 2, 96, "float32", 64, 0.25)


@pytest.fixture(scope="module")
def inputs():
    return ops.draw_inputs(SHAPE)


@pytest.fixture(scope="module")
def held(inputs):
    return ops.draw_held(SHAPE, inputs, 1)[0]


def test_every_operation_equals_its_plain_version(inputs, held):
    made = ops.make_ops(SHAPE, ops.runnable_dense(SHAPE))
    errors = checks.check_ops(SHAPE, made, inputs, held)
    assert set(errors) == set(made) and {"score", "sparse layer", "dense layer, xla"} <= set(made)
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("name", ["score", "select", "attend"])
def test_a_wrong_operation_is_not_timed(name, inputs, held):
    right = ops.make_ops(SHAPE, ())[name]

    def wrong(bit, inputs, held):
        moved = held.replace(indices=held.indices[:, :, ::-1] // 2, scores=held.scores[:, :, ::-1])
        return right(bit, inputs.replace(weights=inputs.weights[..., ::-1]), moved)

    with pytest.raises(AssertionError, match=f"{name} "):
        checks.check_ops(SHAPE, {name: wrong}, inputs, held)


def test_plain_scores_by_hand():
    codes = np.array([[0b101, 0], [1 << 31, 0b10]], np.uint32)  # two words of two tokens
    weights = np.zeros((2, 64), int)
    weights[0, [0, 2, 33, 63]] = 5, -2, 7, 11  # half of them is 10
    weights[1, [0, 1, 33]] = -4, -3, 2  # half is -3, rounded down
    assert checks.plain_scores(codes, weights[:1]).tolist() == [5 - 2 + 11 - 10, 7 - 10]
    assert checks.plain_scores(codes, weights).tolist() == [5 - 2 + 11 - 10, 2 + 3]


def test_plain_selection_by_hand():
    scores = np.array([4, 9, 4, 4, 0])
    assert checks.plain_selection(scores, 3).tolist() == [1, 3, 4]  # the newest, the best, the newer of ties
    assert checks.plain_selection(scores, 5).tolist() == [0, 1, 2, 3, 4]


def test_bytes_by_hand(inputs):
    tokens, kept, kv_heads, batch = 96, 24, 2, 2
    row = 2 * 16 * 4
    assert ops.read_bytes(SHAPE, "dense layer, xla", inputs) == batch * kv_heads * tokens * row
    assert ops.read_bytes(SHAPE, "attend", inputs) == batch * kv_heads * kept * row
    assert ops.read_bytes(SHAPE, "score", inputs) == batch * kv_heads * tokens * (64 // 8 + 4)


def test_a_loop_runs_as_often_as_it_says():
    def count(bit, _, held):
        return held[None], held + 1

    kept, outs = timing.make_loop(count)((jnp.int32(0), jnp.int32(10)), None, 7)
    assert [int(one) for one in kept] == [7, 17] and [int(out[0]) for out in outs] == [6, 16]


def test_time_grows_with_the_work():
    def multiply(bit, matrix, held):
        return held @ matrix + bit.astype(jnp.float32), held

    def nothing(bit, _, held):
        return bit[None], held

    matrices = [jnp.eye(size) for size in (32, 512)]
    times = [
        timing.time_ops({"x": multiply}, nothing, (matrix + 0,), matrix, 3, lambda name: None)["x"]
        for matrix in matrices
    ]
    assert np.median(times[1]) > 5 * np.median(times[0]) >= 0


@pytest.mark.parametrize(("free", "copies"), [(None, 8), (0, 0), (3_000_000, 6)])
def test_copies_are_as_many_as_fit(free, copies):
    assert ops.count_copies(SHAPE, "cpu", free, 8) == pytest.approx(copies, abs=4 if free else 0)


def test_it_prints_tables_and_one_line_of_json_and_resumes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "use_compile_cache", lambda: None)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1e9)
    args = ["--preset", "tiny", "--lengths", "96", "--model-lengths", "60", "--model-batches", "2", "--rounds", "2"]
    args += ["--ops", "sparse layer", "dense layer, xla", "--caches", "2", "--new-tokens", "2", "--profile"]
    args += ["--out", str(tmp_path / "run")]
    assert command(args) == 0
    out, told = capsys.readouterr()
    assert "1 x 96: sparse layer" in told and "2 x 60: decoding" in told
    results = json.loads(out.splitlines()[-1])["results"]
    assert [(row["task"], row["method"]) for row in results] == [
        ("op", "spotlight"), ("op", "dense, xla"), ("decode", "dense"), ("decode", "spotlight"),
    ]  # fmt: skip
    assert all(row["least"] <= row["seconds"] <= row["greatest"] for row in results)
    assert results[1]["floor_seconds"] == 96 * 2 * 2 * 16 * 4 / 1e9
    assert results[3]["bytes_read"] < results[2]["bytes_read"] and results[3]["tokens_read"] == 20
    assert "sparse layer" in out and (tmp_path / "run" / "op.png").exists()
    assert "2 x 60, dense: a step by kernel" in out and all(row["kernels"] for row in results[2:])
    monkeypatch.setattr(speed, "time_length", lambda *_: pytest.fail("timed again"))
    assert command([*args, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == results


def test_ops_are_timed_by_implementation_at_their_own_cases(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "use_compile_cache", lambda: None)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1e9)
    for name, op in OPS.items():
        case = TESTED[name].shrink(op.cases[0])
        monkeypatch.setitem(OPS, name, dataclasses.replace(op, cases=(case,)))
    assert command(["--parts", "kernels", "--rounds", "2", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(row["op"], row["method"]) for row in rows] == [
        ("match_score", "bit_planes"), ("match_score", "matmul"), ("select_top", "counting"), ("score_select", "xla"),
        ("sparse_attention", "gather"), ("estimated_attention", "gather"), ("hash_append", "reference"),
        ("pair_cost", "xla"),
    ]  # fmt: skip
    assert all(row["least"] <= row["seconds"] <= row["greatest"] for row in rows)
    assert rows[0]["case"] == OPS["match_score"].cases[0].name and "hash_append: by implementation" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--preset", "tiny", "--ops", "scor", "--lengths", "64"], "did you mean 'score'"),
        (["--lengths", "0"], "at least 1"),
        (["--parts", "ops", "ops"], "each once"),
        (["--keep", "2"], "keep is 2.0"),
        (["--resume"], "--out"),
    ],
)
def test_bad_flags_are_refused(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "use_compile_cache", lambda: None)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1e9)
    monkeypatch.chdir(tmp_path)
    assert command(args) == 2
    assert message in capsys.readouterr().err
