"""What a person sees: plain lines without a terminal, a live line in one, and how long the rest takes."""

import io
import re

import pytest
import rich.console

from spotlight_jax import display
from spotlight_jax.display import Display, make_table


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def test_plain_lines_come_at_the_start_every_ten_seconds_and_at_the_end(clock, capsys):
    with Display() as shown:
        for done in range(1, 31):
            shown.update("work", done, 30, f"part {done}")
            clock.now += 4.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 1/30; part 1" and lines[-1] == "work: 30/30; part 30"
    # each third part passes ten seconds; 4 s a part
    assert lines[1:-1] == [f"work: {done}/30, {4 * (30 - done)} s left; part {done}" for done in range(4, 30, 3)]


def test_the_time_left_counts_what_was_done_in_this_run(clock, capsys):
    with Display() as shown:
        shown.begin("work", 90, 100)
        shown.update("work", 90, 100)
        clock.now += 20.0
        shown.update("work", 92, 100)
    assert capsys.readouterr().err == "work: 92/100, 80 s left\n"


def test_a_new_name_begins_a_new_task(clock, capsys):
    with Display() as shown:
        shown.update("one", 1, 2)
        clock.now += 100.0
        shown.update("two", 1, 4)
        clock.now += 10.0
        shown.update("two", 3, 4)
        shown.say("said")
    assert capsys.readouterr().err.splitlines() == ["one: 1/2", "two: 1/4", "two: 3/4, 5 s left", "said"]


def test_a_terminal_has_a_live_line_and_what_is_said_stays(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Display() as shown:
        shown.begin("work", 1, 3)
        shown.say("[said]")
        shown.update("work", 2, 3, "a note")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "[said]\n" in text.replace("\r", "") and "2/3" in text and "a note" in text


def test_a_table_aligns_names_left_and_numbers_right(capsys):
    console = rich.console.Console(width=60)
    console.print(
        make_table("title", ["method", "keep", "score"], [["lsh", "0.02", "3"], ["dense", "1", "12.5"]], names=2)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "title"
    assert lines[4] == "│ lsh    │ 0.02 │     3 │" and lines[5] == "│ dense  │ 1    │  12.5 │"


def test_the_last_line_of_json_is_for_programs_alone(capsys, monkeypatch):
    display.print_result({"loss": 0.5})
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    display.print_result({"loss": 0.25})
    assert capsys.readouterr().out == '{"loss": 0.5}\n'


@pytest.mark.parametrize("width", [80, 60, 44])
def test_a_tables_numbers_are_whole_at_every_width(width, capsys):
    rows = [
        ["spotlight", "0.02", "sinks 4 + recent 64", "12.3456", "1,234,567"],
        ["dense", "1", "everything", "9.8", "7"],
    ]
    table = make_table("a title", ["method", "keep", "always read", "perplexity", "tokens"], rows, names=3)
    console = rich.console.Console(width=width)
    display.print_table(console, table)
    out = capsys.readouterr().out
    for row in rows:
        assert all(cell in out for cell in row)
    assert max(map(len, out.splitlines())) <= width


def draw_live(tasks, width):
    """The lines of a terminal whose live part shows (description, done, total, note)s."""
    console = rich.console.Console(width=width, height=24, force_terminal=True, color_system=None, file=io.StringIO())
    live = display._Progress(*display.columns_of(console), console=console)
    for what, done, total, note in tasks:
        live.add_task(what, completed=done, total=total, note=note)
    with console:
        live.start()
        live.stop()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [80, 60, 44])
def test_counts_and_times_are_whole_beside_long_names_and_notes(width):
    note = "loss 0.1234, 1.23 % of attention mass missed, " * 3
    tasks = [("tokenising /a/long/path/of/a/file/books.jsonl.gz", 654321, 654321, ""), ("training", 12, 200, note)]
    lines = draw_live(tasks, width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("tokenising") and "654321/654321" in line for line in lines)
    assert any(line.startswith("training") and "12/200" in line and "-:--:--" in line for line in lines)
    assert any(line.startswith("loss 0.1234") for line in lines)
    if width >= 60:
        assert any(re.search(r"12/200 +0:00:00 -:--:--", line) for line in lines)


def test_the_newest_of_many_tasks_is_in_the_terminal():
    lines = draw_live([(f"tokenising {number}.txt", 1, 2, f"note {number}") for number in range(40)], 60)
    assert any("tokenising 39.txt" in line for line in lines) and "note 39" in lines[-1] and len(lines) < 24


@pytest.mark.parametrize("is_copied", [True, False])
def test_a_command_to_copy_has_no_line_breaks_of_ours(is_copied, monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "44"}.items():
        monkeypatch.setenv(name, value)
    line = "stopped at step 12; continue with: python -m train.layerwise --resume --out runs/one"
    with Display() as shown:
        shown.say(line, is_copied)
    assert (line in capsys.readouterr().err) == is_copied


def test_a_dumb_terminal_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display() as shown:
        shown.update("work", 1, 2, "part 1")
    assert capsys.readouterr().err == "work: 1/2; part 1\n"
