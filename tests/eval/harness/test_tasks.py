"""`spotlight eval harness` on tasks from local files: scores, counts, samples, and what it refuses."""

import functools
import importlib
import json

import numpy as np
import pytest

from eval.harness import command
from eval.harness import run as harness
from eval.harness.scorer import Request
from tests.eval.harness.tiny import expected_dense

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings of the harness and its imports

TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{story}}\n\nQ: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{story}} {{question}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}
DOCS = [
    {"story": "The cat sat on the mat. " * 4, "question": "who?", "choices": ["a cat", "a dog!"], "label": 0},
    {"story": "Rain fell all day long. " * 3, "question": "what?", "choices": ["sun", "rain"], "label": 1},
]


@pytest.fixture
def task_folder(tmp_path):
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    return folder


@pytest.fixture
def asked(model, monkeypatch, tmp_path, task_folder, capsys):
    """Run the command on the tiny model, with no tasks but these; gives the rows and what was said."""
    tasks = importlib.import_module("lm_eval.tasks")
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr(harness, "load_eval_model", lambda cfg: model)
    monkeypatch.setattr(harness, "use_compile_cache", lambda: None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*args):
        code = command(["--task-folder", str(task_folder), "--selection.dense-layers", "0", *args])
        shown = capsys.readouterr()
        return (json.loads(shown.out.splitlines()[-1])["results"] if code == 0 else code), shown.err

    return run


def test_tasks_of_every_kind(asked, model, tmp_path):
    args = ["--tasks", *TASKS, "--methods", "dense", "window", "--keep", "0.1", "--selection.min-tokens", "4"]
    rows, said = asked(*args, "--batch", "2", "--out", str(tmp_path / "run"))
    found = {(row["method"], row["task"]): row for row in rows}
    assert len(found) == 6
    choice = found["dense", "tiny_choice"]
    right = 0
    for doc in DOCS:
        context = list(f"{doc['story']}\n\nQ: {doc['question']}\nA:".encode())
        requests = [Request((*context, *f" {text}".encode()), len(context), 999) for text in doc["choices"]]
        sums = [expected_dense(model, request)[0] for request in requests]
        right += int(np.argmax(sums)) == doc["label"]
    assert choice["score"] == right / 2 and choice["metric"] == "acc" and choice["requests"] == 4
    text = found["dense", "tiny_text"]
    begin = model.tokenizer.eos_token_id
    stories = [doc["story"].encode() for doc in DOCS]
    loss = -sum(expected_dense(model, Request((begin, *story), 1, 999))[0] for story in stories)
    assert text["score"] == pytest.approx(np.exp(loss / sum(map(len, stories))), rel=1e-4)
    window = found["window", "tiny_choice"]
    assert window["tokens_scored"] == 22 and window["tokens_by_selection"] == 18  # all but each continuation's first
    assert found["window", "tiny_text"]["tokens_by_selection"] == sum(len(story) - 3 for story in stories) - 2
    assert found["window", "tiny_writing"]["tokens_by_selection"] == 8
    assert "tiny_choice: 18 of 22 tokens" in said
    samples = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert len(samples) == 6 and "window-0.1-bare-tiny_writing.jsonl" in samples
    again, _ = asked(*args, "--out", str(tmp_path / "run"), "--resume", "--batch", "2")
    assert again == rows


MADE = """task: tiny_made
dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function made.make
doc_to_text: "{{text}}"
doc_to_target: "x"
process_results: !function made.score
metric_list:
  - {metric: "100", aggregation: !function made.mean, higher_is_better: true}
  - {metric: "200", aggregation: !function made.mean, higher_is_better: true}
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}
"""
MAKE = """import datasets, pathlib, transformers

def make(max_seq_lengths=(100,), tokenizer=None, **_):
    print("noise of a task")
    with pathlib.Path(__file__).with_name("made.txt").open("a") as made:
        made.write(f"{max_seq_lengths}\\n")
    known = transformers.AutoTokenizer.from_pretrained(tokenizer)
    docs = [
        {"text": known.decode([97 + doc] * (length - 8)), "length": length}
        for length in max_seq_lengths for doc in range(3)
    ]
    return {"test": datasets.Dataset.from_list(docs)}

def score(doc, results):
    return {"100": -1.0} | {str(doc["length"]): 0.25 if doc["length"] == 100 else 0.75}

def mean(values):
    real = [value for value in values if value != -1]
    return sum(real) / len(real) if real else -1
"""


def test_tasks_that_make_texts_of_a_length_get_the_models_tokenizer_and_one_length_at_a_time(
    asked, task_folder, tmp_path
):
    (task_folder / "tiny_made.yaml").write_text(MADE)
    (task_folder / "made.py").write_text(MAKE)
    args = ["--tasks", "tiny_made", "--limit", "2", "--methods", "dense", "window", "--selection.min-tokens", "4"]
    rows, said = asked(*args, "--lengths", "100", "200", "--out", str(tmp_path / "run"))
    assert (task_folder / "made.txt").read_text() == "[100]\n[200]\n", "once for both methods"
    found = {(row["method"], row["length"]): row for row in rows}
    for method in ("dense", "window"):
        for length, score in ((100, 0.25), (200, 0.75)):
            row = found[method, length]
            assert (row["metric"], row["score"], row["questions"]) == (str(length), score, 2)
            assert row["metrics"] == {str(length): score}  # none of a length that was not asked
            assert row["truncated"] == 0
    newest = [length - 8 + step for length in (100, 200) for step in range(1, 8)]  # read by each step, when dense
    assert found["dense", 100]["tokens_read"] == pytest.approx(np.mean(newest[:7]))
    assert found["dense", 200]["tokens_read"] == pytest.approx(np.mean(newest[7:]))
    assert "tiny_made at 200: 14 of 16 tokens" in said and "noise" not in said
    samples = {file.name for file in (tmp_path / "run" / "samples").iterdir()}
    assert {"window-0.02-bare-tiny_made-100.jsonl", "window-0.02-bare-tiny_made-200.jsonl"} < samples
    rows, _ = asked(*args, "--out", str(tmp_path / "plain"))  # as the task says
    assert [(row["metric"], row["score"], "length" in row) for row in rows] == 2 * [("100", 0.25, False)]
    (task_folder / "made.py").write_text('raise ImportError("install wonderwords")')
    code, said = asked(*args, "--out", str(tmp_path / "lacking"))
    assert code == 2 and "cannot run task 'tiny_made'" in said and "install wonderwords" in said
    code, said = asked(*args, "--lengths", "600")
    assert code == 2 and "lengths 600 pass the model's context of 512" in said


def test_a_question_is_sparse_where_it_is_asked_for(asked, tmp_path):
    args = ["--tasks", "tiny_choice", "--methods", "window", "--keep", "0.1", "--selection.min-tokens", "4"]
    rows, _ = asked(*args, "--question-sparse", "--chat", "--out", str(tmp_path / "run"))
    assert rows[0]["tokens_by_selection"] == rows[0]["tokens_scored"] == 18  # without spaces


def test_long_requests_lose_their_beginning_and_are_counted(asked, tmp_path):
    args = ["--tasks", "tiny_choice", "tiny_writing", "--methods", "dense", "--max-length", "60"]
    rows, said = asked(*args, "--out", str(tmp_path / "run"))
    assert [row["truncated"] for row in rows] == [4, 2]
    assert "tiny_choice: 4 of 4 requests were too long" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "tiny_choise"], "did you mean 'tiny_choice'"),
        ([], "--tasks"),
        (["--tasks", "tiny_choice", "--limit", "0"], "limit is 0"),
        (["--tasks", "tiny_choice", "--lengths", "9", "9"], "each once"),
        (["--tasks", "tiny_choice", "--methods", "densse"], "did you mean 'dense'"),
        (["--tasks", "tiny_choice", "--methods", "dense", "--max-length", "512"], "context of 512"),
    ],
)
def test_bad_input_is_refused(args, message, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    methods = [] if "--methods" in args else ["--methods", "dense"]
    code, said = asked(*methods, *args)
    assert code == 2 and message in said
