"""eval.report on a tiny model: one page of a plan, resumed, and plans that cannot be run."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from eval.report import charts, command, page, plan
from spotlight_jax import runs
from spotlight_jax.errors import InputError
from spotlight_jax.selector.checkpoint import save_selector
from tests.eval.tiny import make_selector

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

PLAN = """
title: Tiny <model>
model: random:tiny
methods: [dense, oracle-scores, spotlight, window]
keep: [0.3, 0.1]
evaluations:
  reading:
    eval: perplexity
    texts: [IDS]
    window: 64
    windows_per_text: 4
    selection: {min_tokens: 4, dense_layers: [0]}
  inspect: {texts: [IDS], window: 64, queries: 16}
"""


@pytest.fixture
def plan_file(tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 320, 2000).astype(np.int32))
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("IDS", str(ids)))
    return file


def edit(file, old, new):
    file.write_text(file.read_text().replace(old, new))
    return file


class Page(html.parser.HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tables, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in ("rect",):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "button", "th"):
            self.tables[-1][-1][-1] += data
        self.text.append(data)


def test_a_plan_becomes_one_page_that_needs_nothing_else(plan_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    args = ["--plan", str(plan_file), "--out", str(out)]
    assert command([*args, "--fraction", "0.5"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)  # the only line on stdout
    assert {row["part"] for row in summary["results"]} == {"reading", "inspect"}
    results = json.loads((out / "results.json").read_text())
    reading = results["parts"][0]
    assert [(row["method"], row["keep"], row["documents"]) for row in reading["results"]] == [
        ("dense", 1.0, 2), ("oracle-scores", 0.3, 2), ("window", 0.3, 2)  # half of the shares and of the windows
    ]  # fmt: skip
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "Tiny &lt;model&gt;" in text
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))
    assert "A quick look at 50 %" in text and text.count("<svg") == 3
    overview, table, _ = page.tables
    assert overview[0] == ["method", "reading: MiB read", "reading: perplexity of all tokens ↓",
                           "inspect: IoU with oracle-scores ↑",
                           "inspect: attention mass read ↑"]  # fmt: skip
    assert [row[0] for row in overview[1:]] == ["dense", "oracle-scores keep 0.3", "window keep 0.3"]
    row = reading["results"][2]
    assert "perplexity of all tokens" in table[0], "the overview's figure has its column in the table"
    assert table[3][:2] == ["window", "0.3"] and f"{row['ppl_pooled']:#.4g}" in table[3]
    assert (out / "reading" / "output.txt").read_text().count("perplexity") > 0

    monkeypatch.setattr("eval.perplexity.run.load_eval_model", lambda cfg: pytest.fail("evaluated again"))
    assert command(["--resume", "--out", str(out)]) == 0
    again = json.loads((out / "results.json").read_text())
    assert again == results
    assert command(["--resume", "--out", str(out), "--fraction", "0.7"]) == 2
    assert "--fraction" in capsys.readouterr().err
    assert command(["--resume", "--out", str(out), "--fraction", "1"]) == 2  # a new report's, but not this one's
    assert "--fraction" in capsys.readouterr().err


def test_an_interrupted_report_has_a_page_and_goes_on(plan_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    args = ["--plan", str(edit(plan_file, "[0.3, 0.1]", "[0.3]")), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("eval.inspect.run.inspect_window", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(args) == 130
    assert "inspect have not run yet" in (out / "report.html").read_text()
    monkeypatch.setattr("eval.perplexity.run.load_eval_model", lambda cfg: pytest.fail("evaluated again"))
    assert command(["--resume", "--out", str(out)]) == 0
    assert "not run yet" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("eval: perplexity", "eval: perplexty", "did you mean 'perplexity'"),
        ("  inspect:", "  inspekt:", "did you mean 'inspect'"),
        ("    window: 64", "    windw: 64", "reading: there is no field 'windw'; did you mean 'window'"),
        ("min_tokens: 4", "min_token: 4", "reading, selection: there is no field 'min_token'; did you mean"),
        ("keep: [0.3, 0.1]", "keeps: [0.3]", "no evaluation has a field 'keeps'; did you mean 'keep'"),
        ("window: 64", "window: many", "reading: "),
        ("window: 64", "window: [", "is no YAML"),
        ("windows_per_text: 4", "out: here", "there is no field 'out'"),
        ("methods: [dense,", "methods: [densse,", "did you mean 'dense'"),
        ("  reading:", "  a/b:", "names are folders"),
        ("window: 64", "window: {a: 1}", "no group of fields"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_at_once(old, new, message, plan_file, tmp_path, capsys):
    out = tmp_path / "report"
    assert command(["--plan", str(edit(plan_file, old, new)), "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plan", "nowhere.yaml"], "cannot read the plan 'nowhere.yaml'"),
        (["--fraction", "0"], "fraction is 0.0"),
        (["--resume"], "--out"),
        (["--resume", "--out", "nowhere"], "no run folder"),
    ],
)
def test_bad_flags_are_refused(args, message, capsys):
    assert command(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "- a\n", "title: x\n", "evaluations: []\n", "evaluations: {inspect: 3}\n"])
def test_what_is_no_plan_is_refused(text, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"plan\.yaml"):
        plan.read_plan(file, {}, 1.0)


def test_the_default_plan_is_sound_with_and_without_a_selector(tmp_path):
    without = plan.read_plan(plan.DEFAULT, {}, 1.0)
    assert [part.evaluation for part in without.parts] == ["inspect", "perplexity", "perplexity", "needle"]
    assert not any(name.startswith("spotlight") for part in without.parts for name in part.config.methods)
    save_selector(tmp_path, make_selector(), "card")
    given = plan.read_plan(plan.DEFAULT, {"selector": str(tmp_path)}, 0.2)
    assert {part.config.model for part in given.parts} == {"random:tiny"}, "the selector's own model"
    ours = {"spotlight", "spotlight+tail"}
    assert all(ours <= set(part.config.methods) and part.config.keep == (0.02,) for part in given.parts)


def test_every_evaluation_of_the_table_can_be_planned():
    for name in plan.EVALUATIONS:
        assert name in page.COLUMNS and name in page.SCORES and name in page._ABOUT


def test_a_common_list_gives_its_first_entry_where_one_fits(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("keep: [0.05, 0.1]\nevaluations: {speed: {preset: tiny}, harness: {tasks: [x], methods: [dense]}}")
    speed, harness = plan.read_plan(file, {}, 0.5).parts
    assert speed.config.keep == 0.05 and speed.config.rounds == 4 and harness.config.keep == (0.05,)


def test_lists_keep_their_first_entries_and_counts_a_share():
    @dataclasses.dataclass(frozen=True)
    class Toy:
        keep: tuple[float, ...] = (0.02, 0.05, 0.1)
        samples: int = 1
        queries: int = 10
        limit: int | None = None
        methods: tuple[str, ...] = ("a", "b")

    cut = plan.cut_down(Toy(), 0.34)
    assert cut == Toy(keep=(0.02, 0.05), samples=1, queries=3)
    assert plan.cut_down(Toy(), 1.0) == Toy()


def test_bars_are_as_long_as_their_values():
    bars = [charts.Bar("dense", 5.0, "5", "#444444", True), charts.Bar("window", 10.0, "10", "#6f5fa3")]
    chart = charts.draw_bars("x", "higher is better", bars)
    widths = [float(found) for found in re.findall(r'width="([\d.]+)" height="12"', chart)]
    assert widths[1] == pytest.approx(2 * widths[0]) and 'class="dense"' in chart
    far = [*bars, charts.Bar("random", 1000.0, "1000", "red"), charts.Bar("<b>", 10.0, "&", "blue")]
    chart = charts.draw_bars("x", "lower is better", far)
    assert "logarithmic" in chart and "&lt;b&gt;" in chart and "<b>" not in chart
    widths = [float(found) for found in re.findall(r'width="([\d.]+)" height="12"', chart)]
    assert widths[1] == widths[3] and widths[2] / widths[1] == pytest.approx(np.log(400) / np.log(4), rel=1e-2)


def test_a_chart_has_room_for_its_longest_name():
    for letters in (5, 30, 60):
        chart = charts.draw_bars("x", "", [charts.Bar("m" * letters, 1.0, "1", "red")])
        left = int(re.search(r'<rect [^>]* x="(\d+)"', chart)[1])
        wide = int(re.search(r'viewBox="0 0 (\d+)', chart)[1])
        assert left > 6 * letters and wide - left == 320


def test_several_selectors_have_short_names_and_colours_of_their_own_on_the_page():
    rows = [
        {"method": name, "keep": keep, "setting": setting, "ppl_pooled": ppl, "bytes_read": 2**20, "text": "all texts"}
        for name, keep, setting, ppl in [
            ("dense", 1.0, "everything", 2.0), ("spotlight@/tmp/ab/wide/selector", 0.02, "bare", 3.0),
            ("spotlight@/tmp/ab/paper/selector", 0.02, "sinks 4 + recent 64", 4.0),
        ]
    ]  # fmt: skip
    kept = [dict(row) for row in rows]
    parts = [{"name": "reading", "eval": "perplexity", "config": {}, "results": rows}]
    shown = ["dense", "spotlight wide keep 0.02", "spotlight paper keep 0.02 + sinks"]
    assert [row[0][0] for row in page.make_overview(parts)["rows"]] == shown
    (chart,) = page.draw_charts(parts)
    assert re.findall(r'class="label"[^>]*>([^<]+)<', chart) == shown
    assert len(set(re.findall(r"--bar: (#\w+)", chart))) == 3 and "/tmp" not in chart
    assert rows == kept


@pytest.mark.parametrize(
    ("value", "ceiling"), [(0.0, 1), (0.7, 1), (1.0, 1), (11.0, 20), (23.0, 25), (0.26, 0.5), (60.0, 100)]
)
def test_axes_end_at_round_numbers(value, ceiling):
    assert charts.nice_ceiling(value) == pytest.approx(ceiling)


def test_the_best_rival_of_each_share_is_marked():
    score = page.Score("ppl", "perplexity", False, str)
    rows = [
        {"method": name, "keep": keep, "ppl": value}
        for name, keep, value in [
            ("dense", 1.0, 1), ("oracle-scores", 0.1, 2), ("lsh", 0.1, 5), ("quest", 0.1, 4), ("lsh", 0.2, 3),
            ("quest", 0.2, 9), ("magicpig", None, 1), ("lsh", 0.3, 2), ("quest", 0.3, 2),
        ]
    ]  # fmt: skip
    assert [(row["method"], row["keep"]) for row in page._find_best(score, rows)] == [
        ("quest", 0.1),
        ("lsh", 0.2),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 3000,
        "evaluations: {inspect: {texts: [[1]]}}",
        "evaluations: {inspect: {1: 2}}",
        "{1: 2, evaluations: {inspect: {}}}",
        "evaluations: {inspect: {texts: 2020-01-01}}",
        "evaluations: {inspect: {texts: 2020-99-99}}",
        "title: {a: 1}\nevaluations: {inspect: {}}",
        "&a {evaluations: *a}",
        "a: \x00",
        "- 1",
        "",
        "evaluations: [inspect]",
        "evaluations: {inspect: {keep: .nan}}",
        "evaluations: {inspect: {eval: [inspect]}}",
        "evaluations: {inspect: {methods: 7}}",
        "evaluations: {inspect: {methods: true}}",
        "evaluations: {inspect: {eval: {a: 1}}}",
        f"evaluations: {{inspect: {{queries: {10**400}}}}}",
    ],
)
def test_a_hostile_plan_is_one_line(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        plan.read_plan(file, {}, 1.0)


def test_a_report_that_another_process_writes_is_refused(plan_file, tmp_path, capsys):
    with runs.hold(tmp_path / "report"):
        assert command(["--plan", str(plan_file), "--out", str(tmp_path / "report")]) == 2
    assert "is being written by process" in capsys.readouterr().err
