"""eval.harness: likelihoods against the plain decoder, greedy texts against the product's, tasks from local files."""

import copy
import dataclasses
import functools
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.common.cases import EvalCase
from eval.harness import command
from eval.harness import run as harness
from eval.harness.scorer import GenerationSettings, Request, Scorer, TaskStats
from eval.model.completion import open_completer
from eval.model.load import EvalModel
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.generate import generate, head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import forward
from spotlight_jax.selector.checkpoint import Selector, save_selector
from spotlight_jax.selector.forms import init_functions
from tests.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

MODEL = PRESETS["tiny"]
SELECTION = SelectionConfig(keep=0.1, min_tokens=4, min_context=0, dense_layers=(0,))
FULL = SelectionConfig(keep=1.0, min_context=0, dense_layers=(0,))


@pytest.fixture(scope="module")
def model():
    cfg = TransformConfig(code_bits=64)
    shape = head_shape(MODEL)
    selector = Selector(shape, init_functions(jax.random.key(1), cfg, shape), "tiny", {})
    params = init_params(jax.random.key(0), MODEL, jnp.float32)
    return EvalModel(MODEL, params, byte_tokenizer(), selector, "tiny")


def scorer(model, method, selection=SELECTION, batch=1):
    return Scorer(model, EvalCase(method, selection.keep, "bare", selection), batch)


def draw_requests():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 40)
    tails = [np.concatenate([shared, rng.integers(0, 256, size)]) for size in (3, 1, 6)]
    requests = [Request(tuple(tail.tolist()), 40, 30) for tail in tails]
    alone = rng.integers(0, 256, 70).tolist()
    return [*requests, Request(tuple(alone), 1, 1), Request(tuple(alone[:12]), 11, 12)]


def expected_dense(model, request):
    tokens = np.asarray(request.tokens)
    logits = np.asarray(forward(model.params, jnp.asarray(tokens[None]), MODEL))[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = np.arange(request.scored_from, len(tokens))
    return log_probs[places - 1, tokens[places]].sum(), bool((logits[places - 1].argmax(1) == tokens[places]).all())


@pytest.mark.parametrize(("method", "batch"), [("dense", 1), ("dense", 3), ("oracle-scores", 1), ("spotlight", 1)])
def test_likelihoods_are_the_decoders_where_everything_is_read(model, method, batch):
    requests = draw_requests()
    answers = scorer(model, method, FULL, batch).score(requests)
    for request, answer in zip(requests, answers, strict=True):
        log_prob, is_greedy = expected_dense(model, request)
        assert answer.log_prob == pytest.approx(log_prob, abs=2e-4) and answer.is_greedy == is_greedy
        assert answer.sparse == 0
        lengths = range(request.scored_from, len(request.tokens))
        assert answer.tokens_read == pytest.approx(sum(lengths))


def test_greedy_is_seen(model):
    tokens = np.random.default_rng(1).integers(0, 256, 20)
    logits = np.asarray(forward(model.params, jnp.asarray(tokens[None]), MODEL))[0]
    best = int(logits[-1].argmax())
    request = Request((*tokens.tolist(), best), 20, 20)
    other = Request((*tokens.tolist(), (best + 1) % 256), 20, 20)
    for method in ("dense", "oracle-scores"):
        assert [answer.is_greedy for answer in scorer(model, method).score([request, other])] == [True, False]


def test_queries_before_sparse_from_are_dense_and_those_after_it_count(model):
    rng = np.random.default_rng(2)
    tokens = tuple(rng.integers(0, 256, 60).tolist())
    late, early = (scorer(model, "oracle-scores").score([Request(tokens, 55, start)])[0] for start in (60, 50))
    assert late.log_prob == pytest.approx(expected_dense(model, Request(tokens, 55, 60))[0], abs=1e-4)
    assert late.sparse == 0 and early.sparse == 5  # the queries at 54 ... 58
    assert early.tokens_read == sum(length - int(0.9 * length) for length in range(55, 60))
    assert abs(early.log_prob - late.log_prob) > 1e-3
    one_token = scorer(model, "oracle-scores").score([Request(tokens[:56], 55, 55)])[0]
    assert one_token.sparse == 0  # its only query is the context's last


def test_shared_beginnings_and_whole_passes_agree(model, monkeypatch):
    requests = draw_requests()
    apart = scorer(model, "spotlight").score(requests)
    monkeypatch.setattr("eval.harness.scorer.TAIL", 0)
    whole = scorer(model, "spotlight").score(requests)
    for one, other in zip(apart, whole, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        assert (one.sparse, one.tokens_read) == (other.sparse, pytest.approx(other.tokens_read))
        assert one.bytes_read == pytest.approx(other.bytes_read)


@pytest.mark.parametrize("method", ["dense", "spotlight", "window"])
def test_texts_are_the_products(model, method):
    prompts = [list(b"once upon a time there was a "), list(b"x" * 50), list(b"abc")]
    texts = scorer(model, method, batch=2).generate(prompts, GenerationSettings(8, ("zz",)))
    assert [text.tokens for text in texts] == [8, 8, 8] and texts[0].text != texts[1].text
    if method == "window":
        assert texts[1].sparse == 7 and texts[1].tokens_read == sum(n - int(0.9 * n) for n in range(51, 58))
        return
    selector = model.selector if method == "spotlight" else None
    base = BaseModel(model.cfg, model.params, model.tokenizer, "tiny")
    cfg = GenerateConfig(max_new_tokens=8, stop=("zz",), selection=SELECTION)
    assert [text.text for text in texts] == [found.text for found in generate(base, prompts, cfg, selector)]
    assert texts[1].sparse == (7 if method == "spotlight" else 0)


@pytest.mark.parametrize("method", ["dense", "window"])
def test_a_tasks_stop_string_that_is_a_special_token_ends_the_text(model, method):
    """`until` names it, and the text, which is decoded without it, does not hold it."""
    prompt = list(b"once upon a time")
    (free,) = scorer(model, method).generate([prompt], GenerationSettings(8))
    tokens = open_completer(model, method, SELECTION, stop_tokens=()).complete(prompt, 8).tokens
    end = next(token for token in tokens[3:] if token < 256)
    ending = dataclasses.replace(model, tokenizer=byte_tokenizer(end))
    name = ending.tokenizer.convert_ids_to_tokens(end)
    ending.tokenizer.eos_token = None  # no end of text of its own, so that the task's string alone stops it
    (stopped,) = scorer(ending, method).generate([prompt], GenerationSettings(8, (name,)))
    (unstopped,) = scorer(ending, method).generate([prompt], GenerationSettings(8, ("never",)))
    assert stopped.tokens < unstopped.tokens == free.tokens == 8


def test_a_selector_behind_the_name_is_the_one_that_reads(model, tmp_path):
    """Scores and texts are those of this selector alone, whichever other stands beside it."""
    shape = head_shape(MODEL)
    cfg = TransformConfig(code_bits=32)
    other = Selector(shape, init_functions(jax.random.key(2), cfg, shape), "tiny", {})
    save_selector(tmp_path / "other", other, "card")
    requests, prompts = draw_requests(), [list(b"once upon a time there was a "), list(range(60))]

    def ask(model, method):
        one = scorer(model, method, batch=2)
        return one.score(requests), one.generate(prompts, GenerationSettings(8))

    alone = ask(dataclasses.replace(model, selector=other), "spotlight")
    own = ask(model, "spotlight")
    assert own[0] != alone[0] and own[1] != alone[1]
    for beside in (model, dataclasses.replace(model, selector=None)):
        assert ask(beside, f"spotlight@{tmp_path / 'other'}") == alone


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


@pytest.mark.filterwarnings("ignore")  # of the harness and its imports
@pytest.mark.parity
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


@pytest.mark.filterwarnings("ignore")  # of the harness and its imports
@pytest.mark.parity
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


def test_a_length_that_was_not_asked_has_no_score():
    results = {"vt": {"alias": "vt", "4096,none": -1, "32768,none": 0.4}, "mcc": {"mcc,none": -1.0}}
    assert harness.summarise_task("vt", results, {})["metrics"] == {"32768": 0.4}
    assert harness.summarise_task("mcc", results, {})["score"] == -1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parity
def test_a_question_is_sparse_where_it_is_asked_for(asked, tmp_path):
    args = ["--tasks", "tiny_choice", "--methods", "window", "--keep", "0.1", "--selection.min-tokens", "4"]
    rows, _ = asked(*args, "--question-sparse", "--chat", "--out", str(tmp_path / "run"))
    assert rows[0]["tokens_by_selection"] == rows[0]["tokens_scored"] == 18  # without spaces


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parity
def test_long_requests_lose_their_beginning_and_are_counted(asked, tmp_path):
    args = ["--tasks", "tiny_choice", "tiny_writing", "--methods", "dense", "--max-length", "60"]
    rows, said = asked(*args, "--out", str(tmp_path / "run"))
    assert [row["truncated"] for row in rows] == [4, 2]
    assert "tiny_choice: 4 of 4 requests were too long" in said


@pytest.mark.parity
def test_the_question_follows_the_last_blank_line():
    lm = importlib.import_module("eval.harness.lm")
    text = "a\n\nb b\n\nQ: c\nA:"
    assert text[lm.question_start(text) :] == "Q: c\nA:"
    assert lm.question_start("one\ntwo ") == 4 and lm.question_start("one\n\n") == 0


@pytest.mark.parity
def test_settings_of_a_task():
    lm = importlib.import_module("eval.harness.lm")
    assert lm.read_settings({"until": "x", "max_gen_toks": 7}) == GenerationSettings(7, ("x",))
    assert lm.read_settings({"temperature": 0.7, "do_sample": False, "until": []}) == GenerationSettings(256)
    drawn = lm.read_settings({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, seed=3)
    assert drawn.sampling == SamplingConfig(0.7, 0, 0.9, 3)
    assert lm.read_settings({"num_beams": 1, "top_p": 0.9, "do_sample": False}) == GenerationSettings(256)
    with pytest.raises(harness.InputError, match="num_beams"):
        lm.read_settings({"num_beams": 4})


@pytest.mark.parity
def test_a_tokenizer_without_an_end_of_text_is_told_where_one_is_needed(model):
    lm = importlib.import_module("eval.harness.lm").SpotlightLM(scorer(model, "dense"))
    assert lm.eot_token_id == model.tokenizer.eos_token_id
    lm.tokenizer = copy.copy(model.tokenizer)
    lm.tokenizer.eos_token = None
    with pytest.raises(harness.InputError, match="no token that ends a text"):
        _ = lm.eot_token_id


def test_a_group_without_a_score_has_the_mean_of_its_tasks():
    results = {"group": {"alias": "g"}, "a": {"acc,none": 0.25}, "b": {"acc,none": 0.75, "acc_stderr,none": 1.0}}
    row = harness.summarise_task("group", results, {"a": TaskStats(requests=2), "b": TaskStats(requests=3)})
    assert row["score"] == 0.5 and row["requests"] == 5


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
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parity
def test_bad_input_is_refused(args, message, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    methods = [] if "--methods" in args else ["--methods", "dense"]
    code, said = asked(*methods, *args)
    assert code == 2 and message in said


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(["--tasks", "arc_easy", "--methods", "dense"]) == 2
    assert "spotlight-jax[eval]" in capsys.readouterr().err
