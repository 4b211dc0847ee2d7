"""What ends a text: every id that the model's files name, and stop strings that are tokens."""

import dataclasses

import numpy as np
import pytest

from spotlight_jax.models.presets import PRESETS
from spotlight_jax.stops import find_stops
from tests.byte_tokenizer import END, byte_tokenizer

MODEL = PRESETS["tiny"]


def tokenizer_with_turns():
    """Bytes, <end>, and three more: two special ones, 257 and 258, and one that is text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|im|>"]})
    tokenizer.add_tokens(["<plain>"])
    return tokenizer


def test_the_models_ids_and_the_tokenizers_end_all_end_a_text():
    cfg = dataclasses.replace(MODEL, stop_tokens=(7, 258))
    assert find_stops(cfg, byte_tokenizer()).tokens == (7, END, 258)
    assert find_stops(cfg, None).tokens == (7, 258)
    assert find_stops(cfg, byte_tokenizer(), ignore_eos=True).tokens == ()


def test_a_stop_string_that_is_a_special_token_is_its_id():
    stops = find_stops(MODEL, tokenizer_with_turns(), ("<|turn|>", "<plain>", "\n"), ignore_eos=True)
    assert stops.tokens == stops.by_string == (257,)
    assert stops.unmatched == ()
    assert {"<plain>", "\n"} <= set(stops.strings)  # text, which is searched


def test_a_stop_string_around_a_special_token_is_said_to_be_in_vain():
    stops = find_stops(MODEL, tokenizer_with_turns(), ("<|im|>\n", "fine"))
    (line,) = stops.unmatched
    assert "'<|im|>\\n' can never match" in line and "'<|im|>' in it" in line
    assert stops.by_string == ()


@pytest.mark.parametrize("special", [257, 258])
def test_decoding_leaves_out_exactly_the_special_tokens(special):
    tokenizer = tokenizer_with_turns()
    assert tokenizer.decode([97, special, 98], skip_special_tokens=True) == "ab"
    assert tokenizer.decode(np.array([259]), skip_special_tokens=True) == "<plain>"
