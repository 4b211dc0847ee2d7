"""eval.harness.lm: what the harness is told of prompts, settings and the end of a text."""

import copy
import importlib

import pytest

from eval.harness.scorer import GenerationSettings
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError
from tests.eval.harness.tiny import scorer

pytestmark = pytest.mark.parity


def test_the_question_follows_the_last_blank_line():
    lm = importlib.import_module("eval.harness.lm")
    text = "a\n\nb b\n\nQ: c\nA:"
    assert text[lm.question_start(text) :] == "Q: c\nA:"
    assert lm.question_start("one\ntwo ") == 4 and lm.question_start("one\n\n") == 0


def test_settings_of_a_task():
    lm = importlib.import_module("eval.harness.lm")
    assert lm.read_settings({"until": "x", "max_gen_toks": 7}) == GenerationSettings(7, ("x",))
    assert lm.read_settings({"temperature": 0.7, "do_sample": False, "until": []}) == GenerationSettings(256)
    drawn = lm.read_settings({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, seed=3)
    assert drawn.sampling == SamplingConfig(0.7, 0, 0.9, 3)
    assert lm.read_settings({"num_beams": 1, "top_p": 0.9, "do_sample": False}) == GenerationSettings(256)
    with pytest.raises(InputError, match="num_beams"):
        lm.read_settings({"num_beams": 4})


def test_a_tokenizer_without_an_end_of_text_is_told_where_one_is_needed(model):
    lm = importlib.import_module("eval.harness.lm").SpotlightLM(scorer(model, "dense"))
    assert lm.eot_token_id == model.tokenizer.eos_token_id
    lm.tokenizer = copy.copy(model.tokenizer)
    lm.tokenizer.eos_token = None
    with pytest.raises(InputError, match="no token that ends a text"):
        _ = lm.eot_token_id
