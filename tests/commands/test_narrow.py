"""Tables on a narrow terminal: no number is lost, no line is longer than the terminal, and NO_COLOR means none."""

import re

import pytest

import eval.fidelity
import eval.longbench
from eval.common.record import Record
from eval.decode import DecodeSpeedConfig
from eval.speed import SpeedConfig, decode
from eval.speed import run as speed
from spotlight_jax.display import Display
from tests.eval.longbench.test_longbench import CASES, write_predictions
from tests.eval.test_fidelity import write
from train import ablate

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COLOURS = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")


@pytest.fixture
def terminal(monkeypatch, capsys):
    """A terminal of a width; what was written to it, without its codes, and whether there were colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")

    def read(columns, act):
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        act()
        out = capsys.readouterr().out
        shown = [line for line in CODES.sub("", out).splitlines() if not line.startswith(('{"', "perplexities: "))]
        assert max(map(len, shown)) <= columns, max(shown, key=len)
        return re.sub(r"\s+", " ", "\n".join(shown))

    return read


WIDTHS = pytest.mark.parametrize("columns", [60, 44])


@WIDTHS
def test_scores_of_longbench(columns, terminal, tmp_path):
    folder = write_predictions(tmp_path / "dense")
    shown = terminal(columns, lambda: eval.longbench.command(["score", str(folder), "--by-length"]))
    for name, (*_, score) in CASES.items():
        assert name in shown and f"{score:.2f}" in shown
    assert "passage_retrieval_zh" in shown and "0-4k" in shown


@WIDTHS
def test_agreement_of_predictions(columns, terminal, tmp_path):
    names = {"passage_retrieval_en_of_a_long_name": "a b c d", "qasper": "same"}
    for name, text in names.items():
        write(tmp_path / "dense", name, [text])
        write(tmp_path / "sparse", name, ["a b x" if text != "same" else text])
    shown = terminal(columns, lambda: eval.fidelity.command([str(tmp_path / "dense"), str(tmp_path / "sparse")]))
    assert all(name in shown for name in names) and "100%" in shown and "1.000" in shown
    assert "0.583" in shown  # 2 of 3 and 2 of 4 words, halved


@WIDTHS
def test_times_of_decoding(columns, terminal):
    reads = {"tokens": 1_048_576}
    times = {"step_seconds": [1.234, 1.5, 2.345], "reads": reads, "peak_bytes": 12.34 * 2**30, "compile_seconds": 56.7}
    rates = {"prefill_tokens_per_second": 123_456.7, "decode_tokens_per_second": 98_765.43}
    kernels = [{"kernel": "a_fused_kernel_of_a_long_name_" * 2, "launches": 28.0, "median": 1e-3, "seconds": 0.028}]
    results = {name: times | rates | {"kernels": kernels} for name in ("dense", "sparse")}
    cfg = DecodeSpeedConfig(model="qwen2.5-7b", profile=True)
    shown = terminal(columns, lambda: decode.show(cfg, results))
    for number in ("123,456.7", "98,765.43", "1,048,576", "12.34", "56.7", "1500.00", "28,000.0"):
        assert shown.count(number) >= 2, number


@WIDTHS
def test_times_of_operations(columns, terminal, tmp_path):
    row = {"task": "op", "op": "score_select of a long name", "length": 1_048_576, "batch": 8, "seconds": [1.234567e-3]}
    cfg = SpeedConfig(out=str(tmp_path / "run"), preset="tiny")
    tables = [speed.make_table("ops", ["operation", "µs", "range", "floor", "speed"], [list(map(str, row.values()))])]

    def act():
        with Record.open(cfg, "speed") as record:
            record.finish([], tables)

    assert "1048576" in terminal(columns, act)


@WIDTHS
def test_variants_side_by_side(columns, terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "plot_ablation", lambda *_: None)
    row = {
        "variant": "asymmetric-per-head",
        "bits": 128,
        "steps": 2000,
        "window": 8192,
        "iou": 0.12345,
    }
    row |= {
        "mass": 0.98765,
        "iou_scores": 0.23456,
        "iou_query_head": 0.34567,
        "mass_query_head": 0.45678,
        "seconds": 1234.5,
    }
    row |= {"ppl_0.02": 12.3456, "ppl_sinks_0.1": 11.2345}
    shown = terminal(columns, lambda: ablate._write_table([row], tmp_path))
    for value in row.values():
        assert (f"{value:.3f}" if isinstance(value, float) else str(value)) in shown


@pytest.mark.parametrize("is_plain", [False, True], ids=["colours", "NO_COLOR"])
def test_no_color_means_none(is_plain, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    if is_plain:
        monkeypatch.setenv("NO_COLOR", "1")
    with Display() as display:
        display.update("work", 1, 2, "a note")
    shown = capsys.readouterr().err
    assert "work" in shown and bool(COLOURS.search(shown)) != is_plain
