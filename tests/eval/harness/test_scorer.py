"""eval.harness.scorer: likelihoods against the plain decoder, greedy texts against the product's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.harness.scorer import GenerationSettings, Request
from eval.model.completion import open_completer
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.generation import generate, head_shape
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.runner import forward
from spotlight_jax.selector.checkpoint import Selector, save_selector
from spotlight_jax.selector.forms import init_functions
from tests.byte_tokenizer import byte_tokenizer
from tests.eval.harness.tiny import MODEL, SELECTION, expected_dense, scorer

pytestmark = pytest.mark.slow  # many methods, compiled anew

FULL = SelectionConfig(keep=1.0, min_context=0, dense_layers=(0,))


def draw_requests():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 40)
    tails = [np.concatenate([shared, rng.integers(0, 256, size)]) for size in (3, 1, 6)]
    requests = [Request(tuple(tail.tolist()), 40, 30) for tail in tails]
    alone = rng.integers(0, 256, 70).tolist()
    return [*requests, Request(tuple(alone), 1, 1), Request(tuple(alone[:12]), 11, 12)]


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
