"""Our tokenizers from GGUF metadata against transformers' own classes."""

import pathlib

import pytest
import transformers

from spotlight_jax.models.embedded import fetch_embedded
from spotlight_jax.models.gguf_file import GgufFile, open_gguf
from spotlight_jax.models.tokenizer import tokenizer_from_gguf
from tests.models.test_tokenizer import TEXTS

pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parents[2]
CORPUS = [*TEXTS, *(path.read_text() for path in sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("tests/*.py")))]


def smollm2(style: str) -> GgufFile:
    """SmolLM2's vocabulary, cut by another model's rule."""
    file = open_gguf(fetch_embedded("smollm2-135m"))
    return GgufFile(file.path, file.metadata | {"tokenizer.ggml.pre": style}, file.tensors)


def test_qwen2_style_equals_transformers() -> None:
    file = smollm2("qwen2")
    vocab, kinds = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    reference = transformers.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocab)},
        merges=[tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]],
        additional_special_tokens=[token for token, kind in zip(vocab, kinds, strict=True) if kind == 3],
    )
    ours = tokenizer_from_gguf(file)
    for text in CORPUS:
        assert ours(text)["input_ids"] == reference(text)["input_ids"]


def test_gpt2_style_equals_transformers_reading_of_the_same_file() -> None:
    # transformers reads every GGUF of this type as GPT-2's, digits in runs: equal only under that rule
    file = smollm2("gpt-2")
    reference = transformers.AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    ours = tokenizer_from_gguf(file)
    for text in CORPUS:
        assert ours(text)["input_ids"] == reference(text)["input_ids"]


def test_smollm_style_equals_transformers_where_there_are_no_digits() -> None:
    file = smollm2("smollm")
    reference = transformers.AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    ours = tokenizer_from_gguf(file)
    for text in CORPUS:
        plain = "".join(letter for letter in text if not letter.isnumeric())
        assert ours(plain)["input_ids"] == reference(plain)["input_ids"]
