"""Generation with any method: what a teacher-forced pass would choose, and what the engine writes."""

import dataclasses

import numpy as np
import pytest

from eval.common.flags import ForwardConfig
from eval.model.completion import Completer, open_completer
from eval.model.scores import Sequence, score_sequence
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.checkpoint import save_selector
from tests.eval.tiny import draw_tokens, make_selector, model

pytestmark = pytest.mark.slow  # whole commands and many methods, compiled anew

SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,), recent_tokens=2)
PROMPT = draw_tokens(50, seed=4).tolist()
NEW = 8


@pytest.mark.parametrize("name", ["dense", "spotlight", "oracle-scores", "quest", "magicpig", "window"])
def test_each_token_is_the_most_probable_one_of_a_teacher_forced_pass(name):
    """Prompts are read densely, new tokens as the method reads."""
    written = open_completer(model(), name, SPARSE).complete(PROMPT, NEW)
    tokens = np.array([*PROMPT, *written.tokens], np.int32)
    assert len(written.tokens) == NEW
    cfg = ForwardConfig(dense_prefix=len(PROMPT))
    method = model().open_method(name, SPARSE)
    passed = score_sequence(model(), Sequence(tokens), method, SPARSE, cfg)
    assert passed.is_greedy[len(PROMPT) - 1 :].all()
    steps = slice(len(PROMPT), len(PROMPT) + NEW - 1)  # the first token is chosen by the prompt
    assert written.tokens_read == pytest.approx(passed.tokens_read[steps].mean(), rel=0.05)
    assert written.bytes_read == pytest.approx(passed.bytes_read[steps].mean(), rel=0.05)


@pytest.mark.parametrize("name", ["dense", "spotlight"])
def test_the_engine_and_the_slow_reference_write_the_same(name):
    fast = open_completer(model(), name, SPARSE).complete(PROMPT, NEW)
    method = model().open_method(name, SPARSE)
    slow = Completer(model(), method.replace(name=f"slow {name}"), SPARSE).complete(PROMPT, NEW)
    assert fast.tokens == slow.tokens


def test_a_selector_behind_the_name_is_the_one_that_reads(tmp_path):
    """Beside another one, or alone."""
    other = make_selector(seed=5)
    save_selector(tmp_path / "other", other, "card")
    alone = open_completer(dataclasses.replace(model(), selector=other), "spotlight", SPARSE).complete(PROMPT, NEW)
    assert alone.tokens != open_completer(model(), "spotlight", SPARSE).complete(PROMPT, NEW).tokens
    for beside in (model(), dataclasses.replace(model(), selector=None)):
        assert open_completer(beside, f"spotlight@{tmp_path / 'other'}", SPARSE).complete(PROMPT, NEW) == alone


@pytest.mark.parametrize("name", ["dense", "window"])
def test_a_stop_token_ends_a_text_and_stays(name):
    tokens = open_completer(model(), name, SPARSE).complete(PROMPT, NEW).tokens
    stop = tokens[3]
    first = tokens.index(stop)
    assert (
        open_completer(model(), name, SPARSE, stop_tokens=(stop,)).complete(PROMPT, NEW).tokens == tokens[: first + 1]
    )


def test_prompts_that_do_not_fit_are_told():
    completer = open_completer(model(), "window", dataclasses.replace(SPARSE, keep=0.5))
    for prompt in ([], [1] * 510):
        with pytest.raises(InputError, match="does not fit the context of 512"):
            completer.complete(prompt, NEW)
