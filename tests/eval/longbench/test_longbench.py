"""LongBench: its table of tasks, its scores, and bad input."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval import longbench
from eval.longbench.predictions import find_files
from eval.longbench.tasks import TASKS, TASKS_E
from spotlight_jax.errors import InputError

# A prediction and answer of every task, and the score of 100 that the published definition gives by hand.
CASES = {
    "narrativeqa": ("The old man", ["an old man", "nobody"], None, 100),
    "qasper": ("unanswerable", ["yes"], None, 0),
    "multifieldqa_en": ("in the year 1876", ["1876"], None, 50),  # 1 of 3 and 1 words
    "multifieldqa_zh": ("在北京。", ["北京"], None, 66.67),  # 1 of 2 and 1 words
    "hotpotqa": ("red, blue", ["blue red"], None, 100),
    "2wikimqa": ("Paris France", ["Paris"], None, 66.67),
    "musique": ("", ["Paris"], None, 0),
    "dureader": ("我来到北京清华大学", ["我来到清华大学"], None, 85.71),  # 3 of 4 and 3 words
    "gov_report": ("a b c d", ["a x b c y"], None, 66.67),
    "qmsum": ("one two", ["one two"], None, 100),
    "multi_news": ("x", ["one two"], None, 0),
    "vcsum": ("我来到北京", ["我来到北京"], None, 100),
    "trec": ("\nHuman being\nDate", ["Human being"], ["Human being", "Human", "Date"], 100),
    "triviaqa": ("Paris\nQuestion: more", ["Paris"], None, 100),
    "samsum": ("\n\nAnn calls Bob\nDialogue:", ["Ann calls Bob"], None, 100),
    "lsht": ("体育或法律", ["体育"], ["体育", "法律", "教育"], 50),
    "passage_count": ("17 or 18", ["17"], None, 50),
    "passage_retrieval_en": ("Paragraph 12", ["Paragraph 12"], None, 100),
    "passage_retrieval_zh": ("段落2", ["段落12"], None, 0),
    "lcc": ("# sum\nreturn a+c\nmore", ["return a+b"], None, 90),
    "repobench-p": ("```\nx = 1", ["x = 1"], None, 100),
}


def write_predictions(folder: Path, cases: dict = CASES, length: int = 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for task, (text, answers, classes, _) in cases.items():
        row = {"pred": text, "answers": answers, "all_classes": classes, "length": length}
        (folder / f"{task}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def score(capsys, *args) -> tuple[int, list[dict], str, str]:
    code = longbench.command(["score", *map(str, args)])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1])["results"] if code == 0 else [], out, err


def test_every_task_is_scored_as_its_definition_says(tmp_path, capsys):
    assert set(CASES) == set(TASKS) and len(TASKS) == 21
    code, results, out, _ = score(capsys, write_predictions(tmp_path / "dense"))
    assert code == 0
    scores = {row["task"]: row["score"] for row in results}
    mean = scores.pop("mean")
    assert scores == {task: expected for task, (*_, expected) in CASES.items()}
    assert mean == pytest.approx(sum(scores.values()) / 21, abs=0.005)
    assert "summarisation" in out and "Not scored" not in out
    assert {row["method"] for row in results} == {"dense"}


def test_a_score_is_the_mean_over_lines_and_over_lengths(tmp_path, capsys):
    rows = [("Paris", 100), ("London", 3999), ("Paris", 4000), ("Paris", 9000)]
    lines = [{"pred": text, "answers": ["Paris"], "all_classes": None, "length": length} for text, length in rows]
    (tmp_path / "hotpotqa_e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, results, out, _ = score(capsys, tmp_path, "--by-length")
    assert results[0]["score"] == 75 and results[0]["count"] == 4
    assert results[0]["by_length"] == {"0-4k": 50, "4-8k": 100, "8k+": 100}
    assert "8k+" in out


def test_a_part_of_the_tasks_is_scored_and_said(tmp_path, capsys):
    folder = write_predictions(tmp_path / "half", {task: CASES[task] for task in list(CASES)[:10]})
    code, results, out, _ = score(capsys, folder)
    assert code == 0 and len(results) == 11 and results[-1]["tasks"] == 10
    assert "10 of 21 tasks" in out and "repobench-p" in out
    _, results, _, _ = score(capsys, folder, "--tasks", "qmsum", "qasper")
    assert [row["task"] for row in results] == ["qasper", "qmsum", "mean"]


GOOD = json.dumps({"pred": "a", "answers": ["a"], "all_classes": None})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"pred": "a", "answers"', "qasper.jsonl:2' is not JSON"),
        ("[1]", "qasper.jsonl:2' is not a JSON object"),
        ('{"answers": ["a"]}', "qasper.jsonl:2' has no 'pred', only 'answers'"),
        ('{"pred": 1, "answers": ["a"]}', "'pred' is not text but int"),
        ('{"pred": "a", "answers": "a"}', "qasper.jsonl:2': 'answers' is not a list"),
        ('{"pred": "a", "answers": []}', "at least one text"),
        ('{"pred": "a", "answers": ["a"], "all_classes": "b"}', "neither null nor a list"),
        ('{"pred": "a", "answers": ["a"], "length": "long"}', "'length' is not a whole number"),
        ('{"pred": "a", "answers": ["a"], "length": true}', "'length' is not a whole number"),
        ('{"pred": "a", "answers": ["a"], "length": -1}', "'length' is not a whole number"),
        ('{"pred": "\\ud800", "answers": ["a"]}', "qasper.jsonl:2' is not valid Unicode"),
    ],
)
def test_a_malformed_line_is_named(line, message, tmp_path, capsys):
    (tmp_path / "qasper.jsonl").write_text(f"{GOOD}\n{line}\n")
    code, _, _, err = score(capsys, tmp_path)
    assert code == 2 and message in err and err.count("\n") == 1


def test_bad_folders_and_tasks_are_refused(tmp_path, capsys):
    def refuse(*args) -> str:
        code, _, _, err = score(capsys, *args)
        assert code == 2 and err.count("\n") == 1
        return err

    assert "give at least one folder" in refuse()
    assert "is no folder" in refuse(tmp_path / "none")
    write_predictions(tmp_path / "run" / "dense")
    with pytest.raises(InputError, match="give a folder in it: dense"):
        find_files(tmp_path / "run")
    assert "did you mean 'hotpotqa'" in refuse(tmp_path / "run" / "dense", "--tasks", "hotpot_qa")
    (tmp_path / "run" / "dense" / "trek.jsonl").write_text(GOOD)
    assert "did you mean 'trec'" in refuse(tmp_path / "run" / "dense")
    one = write_predictions(tmp_path / "one", {"qasper": CASES["qasper"]})
    assert "has no predictions for trec; it holds qasper" in refuse(one, "--tasks", "trec")
    (one / "qasper_e.jsonl").write_text(GOOD)
    assert "LongBench-E form" in refuse(one)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "qasper.jsonl").write_text("\n")
    assert "holds no predictions" in refuse(tmp_path / "empty")
    (tmp_path / "trec").mkdir()
    (tmp_path / "trec" / "trec.jsonl").write_text(GOOD)
    assert "trec.jsonl:1' has no 'all_classes'" in refuse(tmp_path / "trec")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "qasper.jsonl").write_bytes(b"\xe4")
    assert "is not UTF-8" in refuse(tmp_path / "latin")


def test_a_folder_of_methods_is_scored_as_each_of_them_is(tmp_path, capsys):
    for name in ("dense", "oracle-0.1"):
        write_predictions(tmp_path / "predictions" / name)
    _, whole, _, _ = score(capsys, tmp_path / "predictions")
    _, parts, _, _ = score(capsys, tmp_path / "predictions" / "dense", tmp_path / "predictions" / "oracle-0.1")
    assert whole == parts and {row["method"] for row in whole} == {"dense", "oracle-0.1"}


def test_lengths_are_needed_for_scores_by_length(tmp_path, capsys):
    (tmp_path / "qasper.jsonl").write_text(GOOD)
    code, _, _, err = score(capsys, tmp_path, "--by-length")
    assert code == 2 and "qasper.jsonl:1' has no 'length'" in err


def test_scoring_imports_no_jax(tmp_path):
    folder = write_predictions(tmp_path / "dense")
    code = (
        "import sys; from eval import longbench; "
        f"assert longbench.command(['score', {str(folder)!r}]) == 0; "
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parity
def test_prompts_and_lengths_are_the_published_ones():
    """Beside lm-evaluation-harness's copy, which ends some prompts without their last blank or newline."""
    kept = importlib.import_module("lm_eval.tasks.longbench._generate_config")
    for name, task in TASKS.items():
        theirs = kept.dataset2prompt[name].replace("{question}", "{input}")
        if name in ("triviaqa", "samsum"):
            theirs = theirs.replace("{context}\n{input}", "{context}\n\n{input}")  # as in LongBench's own file
        assert task.prompt.rstrip() == theirs.rstrip(), name
        assert task.max_new_tokens == kept.dataset2maxlen[name], name
    assert TASKS["lcc"].prompt.endswith("code:\n") and TASKS["passage_count"].prompt.endswith("is: ")
    plain = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
    assert [name for name, task in TASKS.items() if not task.is_chat] == plain
    assert [name for name, task in TASKS.items() if task.is_one_line] == plain[:4]
    assert len(TASKS_E) == 13 and set(TASKS_E) < set(TASKS)
