"""Agreement of prediction folders."""

import json

import pytest

from eval import fidelity


def write(folder, task, texts, answers=("x",)):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"pred": text, "answers": list(answers), "all_classes": None, "length": 1}) for text in texts]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folders(tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    write(dense, "qasper", ["a b c d", "same", ""])
    write(sparse, "qasper", ["a b x", "same", ""])
    write(dense, "trec", ["one"])
    write(sparse, "trec", ["two"])
    write(dense, "lcc", ["only here"])
    return dense, sparse


def run(capsys, *args):
    code = fidelity.command([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1])["results"] if code == 0 else [], out, err


def test_agreement_by_hand(folders, capsys):
    code, (qasper, trec, mean), out, _ = run(capsys, *folders)
    assert code == 0
    first = (2 / 4 + 2 / 3) / 2  # two words in order, of 4 and of 3
    assert qasper["score"] == pytest.approx((first + 1 + 1) / 3)
    assert qasper["identical"] == pytest.approx(2 / 3) and qasper["count"] == 3
    assert trec["score"] == 0 and mean["score"] == pytest.approx(qasper["score"] / 2)
    assert {row["method"] for row in (qasper, trec, mean)} == {"sparse"}
    assert "left out: lcc" in out


def test_the_plain_rule_gives_empty_answers_nothing(folders, capsys):
    _, (qasper, *_), _, _ = run(capsys, *folders, "--plain")
    assert qasper["score"] == pytest.approx(((2 / 4 + 2 / 3) / 2 + 1) / 3)


def test_order_does_not_matter_and_a_folder_agrees_with_itself(folders, capsys):
    dense, sparse = folders
    there, back = (run(capsys, *pair)[1][-1]["score"] for pair in ((dense, sparse), (sparse, dense)))
    assert there == pytest.approx(back)
    _, results, _, _ = run(capsys, dense, dense, sparse)
    assert [row["method"] for row in results] == ["dense"] * 4 + ["sparse"] * 3
    assert results[3] == {"method": "dense", "task": "mean", "score": 1, "identical": 1, "tasks": 3}


def test_folders_about_other_questions_are_refused(folders, tmp_path, capsys):
    dense, sparse = folders
    assert "give a folder" in run(capsys, dense)[3]
    assert "is no folder" in run(capsys, dense, tmp_path / "none")[3]
    write(sparse, "trec", ["two"], answers=["y"])
    assert "trec.jsonl:1' answer different questions" in run(capsys, dense, sparse)[3]
    write(sparse, "trec", ["two", "three"])
    assert "has 1 predictions and" in run(capsys, dense, sparse)[3]
    write(tmp_path / "other", "qmsum", ["a"])
    code, _, _, err = run(capsys, dense, tmp_path / "other")
    assert code == 2 and "no task is in both" in err and err.count("\n") == 1
