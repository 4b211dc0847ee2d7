"""LongBench's questions answered by a tiny model whose tokens are bytes."""

import dataclasses
import functools
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from eval.fidelity import compare_task
from eval.longbench import answer, command
from eval.longbench.data import Sample, encode_prompt
from eval.longbench.score import score_folder
from eval.longbench.tasks import TASKS
from eval.model.load import EvalModel
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.generation import generate
from spotlight_jax.models.load import BaseModel
from spotlight_jax.selector.checkpoint import save_selector
from tests.byte_tokenizer import byte_tokenizer
from tests.eval import tiny as shared

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

TOKENIZER = byte_tokenizer()
MODEL = dataclasses.replace(shared.MODEL, max_len=1024)


@functools.cache
def model() -> EvalModel:
    return dataclasses.replace(shared.model(), cfg=MODEL, tokenizer=TOKENIZER)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(answer, "load_eval_model", lambda cfg: model())
    monkeypatch.setattr(answer, "use_compile_cache", lambda: None)


def row_of(context: str, question: str, answer: str, classes=None, name: str = "input") -> dict:
    return {"context": context, name: question, "answers": [answer], "all_classes": classes, "length": len(context)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tasks: LongBench's own files, and one as its parquet mirror keeps them."""
    folder = tmp_path_factory.mktemp("data")
    passages = [row_of("Passage 1: Ann is here. " * 3, "Who?", "Ann"), row_of("Bob is there. " * 60, "Who?", "Bob")]
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    types = row_of("Question: Who?\nType: Human\n", "Question: Where?\nType:", "Place", ["Human", "Place"])
    (folder / "trec.jsonl").write_text(json.dumps(types) + "\n")
    chinese = [row_of("段落1: 春天\n段落2: 秋天\n", "秋天", "段落2", name="question")]
    (folder / "passage_retrieval_zh").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(chinese), folder / "passage_retrieval_zh" / "test-00000.parquet")
    return folder


def run(capsys, *args) -> tuple[int, dict, str, str]:
    code = command(list(map(str, args)))
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, out, err


METHODS = ["--selector", "x", "--methods", "dense", "spotlight", "oracle-scores", "--keep", 0.1]


SEPARATORS = "\u2028\u2029\u0085"  # ends of lines to Unicode, and to str.splitlines, but not to JSON lines


def test_unicode_line_separators_in_answers_are_no_ends_of_lines_and_old_files_resume(tiny, tmp_path, capsys):
    rows = [row_of("Ann is here.", "Who?", f"Ann{SEPARATORS}{number}") for number in range(2)]
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    args = ["--data", tmp_path, "--methods", "dense", "--out", tmp_path / "run"]
    code, summary, _, _ = run(capsys, *args)
    assert code == 0 and summary["results"][0]["count"] == 2
    file = tmp_path / "run" / "predictions" / "dense" / "hotpotqa.jsonl"
    written = file.read_text().splitlines()
    assert [json.loads(line)["answers"] for line in written] == [row["answers"] for row in rows]
    # as an older version wrote it, cut within a character
    old = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in written).encode()
    file.write_bytes(old[: old.rindex(SEPARATORS.encode()) + 1])
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run(capsys, *args, "--resume")[1]["results"] == summary["results"]
    assert [json.loads(line) for line in file.read_text().split("\n")[:-1]] == list(map(json.loads, written))


def test_answers_are_written_scored_and_resumed(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["--data", data, *METHODS, "--max-length", 170, "--out", out]
    code, summary, text, err = run(capsys, *args)
    assert code == 0 and "3 of 21 tasks are in" in err and "3 of 4 prompts lost their middle" in text
    folders = {folder.name: folder for folder in (out / "predictions").iterdir()}
    assert set(folders) == {"dense", "spotlight-0.1", "oracle-scores-0.1"}
    for name, folder in folders.items():
        rows = {row["task"]: row for row in summary["results"] if name.startswith(row["method"])}
        scored = {score.task.name: score.score for score in score_folder(folder)}
        assert scored == {task: row["score"] for task, row in rows.items() if task != "mean"} and len(scored) == 3
        assert rows["mean"]["score"] == pytest.approx(sum(scored.values()) / 3)
        if name != "dense":
            own, dense = (one / "hotpotqa.jsonl" for one in (folder, folders["dense"]))
            assert rows["hotpotqa"]["fidelity"] == pytest.approx(compare_task("hotpotqa", dense, own).score)
            assert rows["hotpotqa"]["bytes_read"] < summary["results"][0]["bytes_read"]

    kept = {file: file.read_text() for file in (out / "predictions").rglob("*.jsonl")}
    metrics = (out / "metrics.jsonl").read_text()
    cut = folders["spotlight-0.1"] / "hotpotqa.jsonl"
    cut.write_text(kept[cut][: len(kept[cut]) - 30])  # the second answer is half a line
    lines = [line for line in metrics.splitlines() if not ("spotlight" in line and "hotpotqa" in line)]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, again, _, err = run(capsys, *args, "--resume")
    assert code == 0 and "8 of 9 parts were finished before" in err
    assert {file: file.read_text() for file in kept} == kept and again["results"] == summary["results"]


def test_a_selector_behind_the_name_has_predictions_of_its_own(tiny, data, tmp_path, capsys):
    save_selector(tmp_path / "other", shared.make_selector(seed=5), "card")
    name, out = f"spotlight@{tmp_path / 'other'}", tmp_path / "run"
    args = ["--selector", "x", "--methods", "spotlight", name, "--keep", 0.1, "--tasks", "hotpotqa", "--out", out]
    code, summary, _, _ = run(capsys, "--data", data, *args)
    assert code == 0 and [row["method"] for row in summary["results"]] == ["spotlight"] * 2 + [name] * 2
    folders = sorted((out / "predictions").iterdir())
    assert len(folders) == 2 and f"{tmp_path.name}%2Fother-0.1" in folders[1].name
    assert all((folder / "hotpotqa.jsonl").exists() for folder in folders)
    texts = [(folder / "hotpotqa.jsonl").read_text() for folder in folders]
    assert texts[0] != texts[1]


def test_the_dense_answer_is_what_generate_gives_for_the_prompt_by_hand(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    code, *_ = run(capsys, "--data", data, "--methods", "dense", "--tasks", "hotpotqa", "trec", "--out", out)
    assert code == 0
    asked = (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    )
    context = "Passage 1: Ann is here. " * 3
    plain = f"{asked}\n\nThe following are given passages.\n{context}\n\n{asked}\n\nQuestion: Who?\nAnswer:"
    shots = "Please determine the type of the question below. Here are some examples of questions.\n\n"
    shots += "Question: Who?\nType: Human\n\nQuestion: Where?\nType:"
    base = BaseModel(MODEL, model().params, TOKENIZER, "tiny")
    for task, prompt, count in (("hotpotqa", f"[user]{plain}[assistant]", 32), ("trec", shots, 64)):
        row = json.loads((out / "predictions" / "dense" / f"{task}.jsonl").read_text().splitlines()[0])
        (expected,) = generate(base, [prompt], GenerateConfig(max_new_tokens=count))
        assert row["pred"] == expected.text and row["prompt_tokens"] == len(prompt)
        assert set(row) >= {"pred", "answers", "all_classes", "length"}


def test_long_prompts_lose_their_middle():
    sample = Sample("0123456789" * 30, "Who?", ("x",), None, 300)
    whole = TASKS["trec"].prompt.format(context=sample.context, input="Who?")
    prompt = encode_prompt(TOKENIZER, MODEL.vocab, TASKS["trec"], sample, max_length=101, capacity=1000, chat=True)
    assert prompt.is_cut and TOKENIZER.decode(prompt.tokens) == whole[:50] + whole[-50:]
    exact = encode_prompt(
        TOKENIZER, MODEL.vocab, TASKS["trec"], sample, max_length=len(whole), capacity=1000, chat=True
    )
    assert not exact.is_cut and TOKENIZER.decode(exact.tokens) == whole
    asked = TASKS["qmsum"].prompt.format(context=sample.context, input="Who?")
    chat = encode_prompt(TOKENIZER, MODEL.vocab, TASKS["qmsum"], sample, max_length=100, capacity=1000, chat=True)
    assert TOKENIZER.decode(chat.tokens) == f"[user]{asked[:50]}{asked[-50:]}[assistant]"
    bare = encode_prompt(TOKENIZER, MODEL.vocab, TASKS["qmsum"], sample, max_length=100, capacity=1000, chat=False)
    assert TOKENIZER.decode(bare.tokens) == asked[:50] + asked[-50:]
    tight = encode_prompt(TOKENIZER, MODEL.vocab, TASKS["qmsum"], sample, max_length=100, capacity=90, chat=True)
    assert len(tight.tokens) == 90


def test_longbench_e_has_files_and_scores_of_its_own(tiny, tmp_path, capsys):
    rows = [row_of("x" * 40, "Who?", "Ann") | {"length": length} for length in (100, 5000)]
    (tmp_path / "hotpotqa_e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--data", tmp_path, "--e", "--methods", "dense", "--limit", 1, "--out", tmp_path / "run"]
    code, summary, out, _ = run(capsys, *args)
    assert code == 0 and "LongBench-E" in out
    assert summary["results"][0]["by_length"]["4-8k"] is None and summary["results"][0]["count"] == 1
    assert (tmp_path / "run" / "predictions" / "dense" / "hotpotqa_e.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--tasks", "hotpot"], "did you mean 'hotpotqa'"),
        (["--tasks", "qasper"], "has no qasper; it holds hotpotqa"),
        (["--e", "--tasks", "narrativeqa"], "LongBench-E has no task 'narrativeqa'"),
        (["--limit", 0], "limit is 0"),
        (["--max-length", 1], "give at least 2 tokens"),
        (["--max-length", 5000], "of hotpotqa pass the model's context of 1024; give at most --max-length 975"),
        (["--methods", "spotlite"], "did you mean 'spotlight'"),
    ],
)
def test_bad_flags_are_told_in_one_line(args, message, tiny, data, tmp_path, capsys):
    base = ["--data", data, "--methods", "dense", "--out", tmp_path / "run"]
    code, _, _, err = run(capsys, *base, *args)
    assert code == 2 and message in err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a"', "trec.jsonl:1' is not JSON"),
        ("7", "trec.jsonl:1' is not a JSON object"),
        ('{"context": "a", "answers": ["b"], "length": 1}', "trec.jsonl:1' has no text 'input'"),
        ('{"context": "a", "input": "b", "answers": [], "length": 1}', "'answers' is not a list"),
        ('{"context": "a", "input": "b", "answers": "bc", "length": 1}', "'answers' is not a list"),
        ('{"context": "a", "input": "b", "answers": ["c"], "all_classes": 5, "length": 1}', "'all_classes' is neither"),
        ('{"context": "a", "input": "b", "answers": ["b"]}', "'length' is not a whole number"),
        ("", "holds no question of trec"),
    ],
)
def test_a_malformed_question_is_named(line, message, tiny, tmp_path, capsys):
    (tmp_path / "trec.jsonl").write_text(line + "\n")
    code, _, _, err = run(capsys, "--data", tmp_path, "--methods", "dense", "--out", tmp_path / "run")
    assert code == 2 and message in err.splitlines()[-1]


def test_folders_without_a_task_or_with_two_files_of_one_are_refused(tiny, tmp_path, capsys):
    args = ["--data", tmp_path, "--methods", "dense", "--out", tmp_path / "run"]
    assert "holds no LongBench task" in run(capsys, *args)[3]
    (tmp_path / "trec.parquet").write_text("no parquet")
    assert "not a readable parquet file" in run(capsys, *args)[3]
    (tmp_path / "trec.jsonl").write_text("{}\n")
    assert "has several files for trec" in run(capsys, *args)[3]


def test_a_hub_id_is_read_as_a_stream_and_without_a_network_told_in_one_line(tiny, data, tmp_path, capsys, monkeypatch):
    asked = []

    def open_mirror(path, config, split, streaming):
        asked.append((path, config, split))
        return datasets.Dataset.from_list([row_of("a", "b", "c", name="question")] * 3).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", open_mirror)
    args = ["--data", "hf:owner/name", "--tasks", "lcc", "--limit", 2, "--methods", "dense", "--out"]
    code, summary, _, _ = run(capsys, *args, tmp_path / "one")
    assert code == 0 and summary["results"][0]["count"] == 2 and set(asked) == {("owner/name", "lcc", "test")}

    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(MaxRetryError)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    code, _, _, err = run(capsys, *args, tmp_path / "two")
    assert code == 2 and "cannot open 'hf:owner/name'" in err and "check the name and the network" in err
