"""Generation with any method: what a teacher-forced pass would choose, and what the engine writes."""

import dataclasses

import numpy as np
import pytest

from eval.decoder import Decoder, open_decoder
from eval.flags import ForwardConfig
from eval.forward import Sequence, pass_sequence
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.checkpoint import save_selector
from tests.eval.subjects import draw_tokens, make_selector, subject

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,), recent_tokens=2)
PROMPT = draw_tokens(50, seed=4).tolist()
NEW = 8


@pytest.mark.parametrize("name", ["dense", "spotlight", "oracle-scores", "quest", "magicpig", "window"])
def test_each_token_is_the_most_probable_one_of_a_teacher_forced_pass(name):
    """Prompts are read densely, new tokens as the method reads."""
    written = open_decoder(subject(), name, SPARSE).write(PROMPT, NEW)
    tokens = np.array([*PROMPT, *written.tokens], np.int32)
    assert len(written.tokens) == NEW
    cfg = ForwardConfig(dense_prefix=len(PROMPT))
    method = subject().open_method(name, SPARSE)
    passed = pass_sequence(subject().params, subject().cfg, Sequence(tokens), method, SPARSE, cfg)
    assert passed.is_greedy[len(PROMPT) - 1 :].all()
    steps = slice(len(PROMPT), len(PROMPT) + NEW - 1)  # the first token is chosen by the prompt
    assert written.tokens_read == pytest.approx(passed.tokens_read[steps].mean(), rel=0.05)
    assert written.bytes_read == pytest.approx(passed.bytes_read[steps].mean(), rel=0.05)


@pytest.mark.parametrize("name", ["dense", "spotlight"])
def test_the_engine_and_the_slow_reference_write_the_same(name):
    fast = open_decoder(subject(), name, SPARSE).write(PROMPT, NEW)
    method = subject().open_method(name, SPARSE)
    slow = Decoder(subject(), method.replace(name=f"slow {name}"), SPARSE).write(PROMPT, NEW)
    assert fast.tokens == slow.tokens


def test_a_selector_behind_the_name_is_the_one_that_reads(tmp_path):
    """Beside another one, or alone."""
    other = make_selector(seed=5)
    save_selector(tmp_path / "other", other, "card")
    alone = open_decoder(dataclasses.replace(subject(), selector=other), "spotlight", SPARSE).write(PROMPT, NEW)
    assert alone.tokens != open_decoder(subject(), "spotlight", SPARSE).write(PROMPT, NEW).tokens
    for beside in (subject(), dataclasses.replace(subject(), selector=None)):
        assert open_decoder(beside, f"spotlight@{tmp_path / 'other'}", SPARSE).write(PROMPT, NEW) == alone


@pytest.mark.parametrize("name", ["dense", "window"])
def test_a_stop_token_ends_a_text_and_stays(name):
    tokens = open_decoder(subject(), name, SPARSE).write(PROMPT, NEW).tokens
    stop = tokens[3]
    first = tokens.index(stop)
    assert open_decoder(subject(), name, SPARSE, stop_tokens=(stop,)).write(PROMPT, NEW).tokens == tokens[: first + 1]


def test_prompts_that_do_not_fit_are_told():
    decoder = open_decoder(subject(), "window", dataclasses.replace(SPARSE, keep=0.5))
    for prompt in ([], [1] * 510):
        with pytest.raises(InputError, match="does not fit the context of 512"):
            decoder.write(prompt, NEW)
