"""Text from tokens as they come."""

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from spotlight_jax.text_stream import BROKEN, TextStream
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces_of(data, stop=(), size=1):
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.push(data[start : start + size]) for start in range(0, len(data), size)]
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=40), st.integers(1, 5))
def test_pieces_together_are_the_text(text, size):
    pieces, stream = pieces_of(list(text.encode()), size=size)
    assert "".join(pieces) == text == stream.text


@given(st.text(alphabet=st.characters(exclude_characters=BROKEN), max_size=40))
def test_no_piece_holds_a_broken_character(text):
    pieces, _ = pieces_of(list(text.encode()))
    assert not any(BROKEN in piece for piece in pieces)


@given(st.binary(max_size=60))
def test_bytes_that_never_become_text_come_out_broken_and_in_bounded_time(data):
    pieces, stream = pieces_of(list(data))
    assert "".join(pieces) == stream.text
    assert stream.text.replace(BROKEN, "") == data.decode("utf-8", errors="replace").replace(BROKEN, "")


def test_broken_bytes_do_not_hold_the_text_back_for_ever():
    pieces, _ = pieces_of([0xFF] * 40)
    assert pieces[-1] != BROKEN * 40 and sum(map(len, pieces)) == 40


@pytest.mark.parametrize("broken", range(8, 20))
def test_a_character_after_broken_bytes_arrives_whole(broken):
    _, stream = pieces_of([0xFF] * broken + list("\N{ROCKET}".encode()))
    assert stream.text == BROKEN * broken + "\N{ROCKET}"


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    pieces, stream = pieces_of(list(text.encode()), stop)
    ends = [text.find(string) for string in stop if string in text]
    # the stop string that is complete first ends the text
    done = [min(size for size in range(len(text) + 1) if string in text[:size]) for string in stop if string in text]
    whole = text[: min(done)] if done else text
    expected = whole[: min(whole.find(string) for string in stop if string in whole)] if done else text
    assert "".join(pieces) == stream.text == expected
    assert stream.is_stopped == bool(ends)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_stop_string_across_pieces_is_never_shown(size):
    pieces, stream = pieces_of(list(b"one two STOP three"), ("STOP",), size)
    assert stream.text == "one two " and "S" not in "".join(pieces)


def test_a_stop_string_never_met_loses_nothing():
    pieces, stream = pieces_of(list(b"almost STO"), ("STOP",))
    assert "".join(pieces) == "almost STO" and not stream.is_stopped


WORDS = ["<unk>", "<s>", "<turn>", "\u2581", "\u2581\u2581", "\u2581the", "\u2581cat", "s", ".", "\u2581a"]


def sentencepiece_like(metaspace):
    """Words that carry their blank before them, as LLaMA 2's (a sequence of decoders) or T5's (Metaspace) do."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Metaspace() if metaspace else decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", additional_special_tokens=["<turn>"]
    )


@pytest.mark.parametrize("metaspace", [False, True])
@given(tokens=st.lists(st.integers(0, len(WORDS) - 1), max_size=25), size=st.integers(1, 3))
def test_pieces_of_words_with_blanks_before_them_are_the_text_around_special_tokens_too(metaspace, tokens, size):
    tokenizer = sentencepiece_like(metaspace)
    stream = TextStream(tokenizer)
    pieces = [stream.push(tokens[start : start + size]) for start in range(0, len(tokens), size)] + [stream.finish()]
    assert "".join(pieces) == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_word_after_a_special_token_keeps_its_blank():
    stream = TextStream(sentencepiece_like(False))
    stream.push([5, 6, 2])  # the cat<turn>
    assert stream.push([9]) == " a"
