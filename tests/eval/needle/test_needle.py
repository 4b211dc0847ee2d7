"""Haystacks, the pass over what follows a prompt, and the command, with a tiny model whose tokens are bytes."""

import functools
import json

import jax
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from eval.common.flags import ForwardConfig, SelectionFlags
from eval.model.load import EvalModel
from eval.model.scores import Sequence, prefill, score_sequence, score_tokens
from eval.needle import NeedleConfig, command
from eval.needle import run as needle
from eval.needle.haystack import Haystack
from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import run_layer
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.forms import init_functions
from tests.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

MODEL = PRESETS["tiny"]
TOKENIZER = byte_tokenizer()
SELECTION = SelectionFlags(min_tokens=5, sink_tokens=2, recent_tokens=3, dense_layers=(0,)).at(0.2)


@functools.cache
def model() -> EvalModel:
    cfg, shape = TransformConfig(code_bits=64), head_shape(MODEL)
    selector = Selector(shape, init_functions(jax.random.key(1), cfg, shape), "tiny", {})
    return EvalModel(MODEL, init_params(jax.random.key(0), MODEL), TOKENIZER, selector, "tiny")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text of numbered sentences, so that every piece of it says where it is from."""
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(" ".join(f"Sentence number {number} stands here." for number in range(60)))
    return file


def tokens_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


# The pass over a tail


@pytest.mark.parametrize("name", ["dense", "spotlight", "lsh-centred", "quest", "magicpig"])
def test_a_tail_after_a_dense_prompt_equals_a_pass_with_a_dense_prefix(name):
    tokens, cut = tokens_of(120), 90
    method = model().open_method(name, SELECTION)
    whole = score_sequence(model(), Sequence(tokens), method, SELECTION, ForwardConfig(dense_prefix=cut + 4))
    prompt = prefill(model(), tokens[:cut], capacity=150, total=120)
    tail = score_tokens(model(), tokens[cut:], method, SELECTION, prompt, cut + 4, width=48)
    np.testing.assert_allclose(tail.log_probs, whole.log_probs[cut:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tail.best[:-1] == tokens[cut + 1 :], whole.is_greedy[cut:])
    for field in ("tokens_read", "bytes_read", "index_bytes"):
        np.testing.assert_allclose(getattr(tail, field), getattr(whole, field)[cut:], rtol=1e-5)


def make_evaluator(text_file, method: str, **fields) -> tuple[needle.NeedleEvaluator, needle.EvalCase]:
    cfg = NeedleConfig(
        methods=(method,), selector="x", lengths=(400,), sparse_from="answer", haystack=str(text_file), **fields
    )
    case = needle.EvalCase(method, 0.2, "bare", SELECTION)
    methods = {case: model().open_method(method, SELECTION)}
    return needle.NeedleEvaluator(
        cfg, model(), TOKENIZER, Haystack(cfg.haystack, TOKENIZER, MODEL.vocab, 800), methods
    ), case


def test_prompts_of_about_one_length_compile_one_prefill_and_say_what_they_say_alone(text_file):
    evaluator, case = make_evaluator(text_file, "quest")
    question = evaluator.question(400, 0.5, 0)
    before = run_layer._cache_size()
    short = needle.Question(question.prompt[:330], question.question, question.answer)
    for prompt in (question.prompt[:321], question.prompt[:384]):
        evaluator.prefill(needle.Question(prompt, question.question, question.answer))
    assert run_layer._cache_size() - before <= 1
    alone = prefill(model(), short.prompt, capacity=464, total=len(short.tokens))
    found, expected = (needle.ask(evaluator, short, case, prompt)[0] for prompt in (evaluator.prefill(short), alone))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dense", "spotlight"])
def test_exact_means_that_greedy_decoding_writes_the_answer(name, text_file):
    evaluator, case = make_evaluator(text_file, name, generate=True)
    question = evaluator.question(400, 0.5, 0)
    selector = model().selector if name == "spotlight" else None
    engine = Engine(MODEL, model().params, selector, DecodeConfig(selection=SELECTION, block=8))
    state = engine.prefill([[*question.prompt.tolist(), *question.question.tolist()]], 9)
    written = np.asarray(state.tokens).tolist()
    while len(written) < 9:
        state, tokens = engine.decode(state, 9 - len(written))
        written += tokens[0].tolist()
    right = needle.Question(question.prompt, question.question, np.asarray(written, np.int32))
    row, said = needle.ask(evaluator, right, case, evaluator.prefill(right))
    assert row["exact"] == row["accuracy"] == 1 and said == TOKENIZER.decode(written)
    other = np.asarray([*written[:4], (written[4] + 1) % 256, *written[5:]], np.int32)
    wrong = needle.Question(question.prompt, question.question, other)
    row, said = needle.ask(evaluator, wrong, case, evaluator.prefill(wrong))
    assert row["exact"] == 0 and row["accuracy"] < 1 and said == TOKENIZER.decode(written)


# Haystacks


def open_haystack(text_file) -> Haystack:
    return Haystack(str(text_file), TOKENIZER, MODEL.vocab, 800)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("variant", "statement"), [("needle", "The best thing to do in"), ("passkey", "The pass key is")]
)
def test_something_is_hidden_at_its_depth_and_asked_for_at_the_end(variant, statement, depth, text_file):
    question = open_haystack(text_file).ask(variant, 400, depth, np.random.default_rng(3), 64)
    assert len(question.tokens) == 400
    prompt, asked, answer = map(TOKENIZER.decode, (question.prompt, question.question, question.answer))
    assert answer in prompt and statement in asked and asked.startswith("\n\nWhat is the")
    hidden = prompt.index(statement)
    before = len(prompt) - len(prompt[hidden:].partition("." if variant == "needle" else "is the pass key.")[0])
    hay = hidden / max(1, len(prompt) - len(statement) - 60)
    assert before and abs(hay - depth) < 0.3
    if depth == 0:
        assert prompt.startswith(f" {statement}")
    elif depth == 1:
        assert prompt.endswith("." if variant == "needle" else "pass key.")
    else:
        assert prompt[: hidden - 1].endswith("here.")  # after a whole sentence


def test_a_passage_is_begun_again(text_file):
    question = open_haystack(text_file).ask("copy", 400, 0.5, np.random.default_rng(3), 64)
    passage = TOKENIZER.decode(np.concatenate([question.question, question.answer]))
    prompt = TOKENIZER.decode(question.prompt)
    assert len(passage) == 64 and prompt.count(passage) == 1
    assert len(question.question) == 16 and len(question.tokens) == 400
    assert 100 < prompt.index(passage) <= 168  # half of the other 272, or the end of a sentence before it


def test_questions_differ_by_sample_and_not_by_call(text_file):
    evaluator, _ = make_evaluator(text_file, "dense", variant="passkey")
    first, again, other = (evaluator.question(400, 0.5, sample).tokens for sample in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("template", "begin"), [("<s> $A", 1), ("<s> $A </s>", 1), ("$A </s>", 0), ("$A", 0)])
def test_a_haystack_begins_as_the_tokenizer_begins_a_text_whatever_it_puts_after_it(template, begin, text_file):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(ids.items()))
    haystack = Haystack(str(text_file), tokenizer, MODEL.vocab, 800)
    question = haystack.ask("passkey", 400, 0.5, np.random.default_rng(3), 64)
    assert question.prompt[:begin].tolist() == [ids["<s>"]] * begin and len(question.tokens) == 400
    assert not set(ids.values()) & set(question.tokens[begin:].tolist())


def test_a_haystack_of_rows_is_read_by_its_column(tmp_path, text_file):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"title": "no", "body": text_file.read_text()}) + "\n")
    found = Haystack(str(rows), TOKENIZER, MODEL.vocab, 800, "body")
    np.testing.assert_array_equal(found.tokens, open_haystack(text_file).tokens)
    with pytest.raises(InputError, match="text"):
        Haystack(str(rows), TOKENIZER, MODEL.vocab, 800)


# The command


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(needle, "load_eval_model", lambda cfg: model())
    monkeypatch.setattr(needle, "use_compile_cache", lambda: None)


def run(capsys, *args) -> tuple[int, dict, str]:
    code = command(list(map(str, args)))
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err


BASE = ["--selector", "x", "--methods", "dense", "spotlight", "window", "--lengths", 240, 320, "--depths", 0, 1]


@pytest.mark.parametrize("variant", ["passkey", "copy"])
def test_every_method_gets_every_question_once(variant, tiny, text_file, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*BASE, "--variant", variant, "--haystack", text_file, "--samples", 2, "--out", out]
    args += ["--passage", 40] if variant == "copy" else []
    code, summary, _ = run(capsys, *args)
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2 * 2 and all(row["samples"] == 2 for row in rows)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 24 and {answer["wanted"] for answer in answers} == {a["wanted"] for a in answers[::3]}
    dense, spotlight, _ = summary["results"]
    assert dense["method"] == "dense" and dense["task"] == variant and set(dense["by_length"]) == {"240", "320"}
    assert dense["questions"] == 2 * 2 * 2 and dense["by_length"]["240"]["questions"] == 2 * 2
    losses = [row["loss"] for row in rows if row["method"] == "dense"]
    assert dense["ppl"] == pytest.approx(np.exp(np.mean(losses)))
    assert dense["score"] == dense["accuracy" if variant == "copy" else "exact"]
    assert spotlight["tokens_read"] < dense["tokens_read"] and spotlight["bytes_read"] < dense["bytes_read"]
    assert (out / f"{variant}.png").stat().st_size > 5000
    code, again, err = run(capsys, *args, "--resume", "--methods", "dense", "spotlight", "window", "oracle-scores")
    assert code == 0 and "12 of 16 parts were finished before" in err
    assert again["results"][:3] == summary["results"] and again["results"][3]["method"] == "oracle-scores"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", 9000], "lengths 9000 pass the model's context of 512"),
        (["--lengths", 60], "tokens leave"),
        (["--lengths", 0], "give at least 1 token"),
        (["--lengths", 200, 200], "each once"),
        (["--depths", 1.5], "give numbers from 0"),
        (["--samples", 0], "samples is 0"),
        (["--variant", "copy", "--passage", 8], "give at least 32 tokens"),
        (["--variant", "passkeys"], "Did you mean 'passkey'"),
        (["--methods", "spotlite"], "did you mean 'spotlight'"),
        (["--haystack", "text:sherlok"], "did you mean 'text:sherlock'"),
        (["--haystack", "nowhere.txt"], "no such file or folder"),
        (["--lengths", 512, "--haystack", "SHORT"], "give a longer one"),
    ],
)
def test_bad_input_is_told_in_one_line(args, message, tiny, text_file, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    given = [str(short) if arg == "SHORT" else arg for arg in args]
    base = ["--selector", "x", "--haystack", text_file, "--lengths", 200, "--out", tmp_path / "run"]
    code, _, err = run(capsys, *base, *given)
    assert code == 2 and message in err.splitlines()[-1]


def test_a_model_without_a_tokenizer_is_refused():
    cfg = NeedleConfig(methods=("dense",), lengths=(100,))
    bare = EvalModel(MODEL, {}, None, None, "random:tiny")
    with pytest.raises(InputError, match="has no tokenizer"):
        needle.check_model(cfg, bare)
