"""Tokenizers: a folder's own, or one built from a GGUF file's metadata. None of it needs torch."""

import pathlib
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import nearest
from spotlight_jax.models.gguf_file import GgufFile

# how LLaMA 3 and Qwen2 cut text before merging; they differ in the run of digits
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPECIAL, _USER_DEFINED = 3, 4  # token types of the GGUF specification


def load_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face's layout.

    Code that the folder holds is never run: left to itself, transformers would ask on standard input whether to, where
    prompts come from.

    Raises InputError naming the folder when there is none, it cannot be read, or it needs code of its own.
    """
    # from config.json alone transformers would make a tokenizer without a vocabulary
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise InputError(f"{folder}: holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds, for files that are missing, cut short or of no use
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


def tokenizer_from_gguf(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer that a GGUF file's `tokenizer.ggml.*` metadata describes.

    Raises InputError when the metadata is missing or of a kind that is not implemented.
    """
    kind = _field(file, "model", str)
    if kind != "gpt2":
        raise InputError(f"{file.path}: tokenizer type {kind!r} is not supported; supported: gpt2 (byte-level BPE)")
    vocab = _field(file, "tokens", list)
    merges = [tuple(merge.split(" ", 1)) for merge in _field(file, "merges", list)]
    cut = _pre_tokenizer(file)
    style = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocab)},
            merges=merges,
            ignore_merges=style == "llama-bpe",  # LLaMA 3 looks a whole word up first
        )
    )
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
    types = _field(file, "token_type", list)
    for types_wanted, special in (((_SPECIAL,), True), ((_USER_DEFINED,), False)):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(vocab, types, strict=True)
            if token_type in types_wanted
        ]
        backend.add_tokens(added)
    names = _special_names(file, vocab)
    bos = names.get("bos_token")
    if file.metadata.get("tokenizer.ggml.add_bos_token", style == "llama-bpe") and bos is not None:
        with_bos = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab.index(bos))]
        )
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), with_bos])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=int(file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length", 1 << 30)),
        **names,
    )
    tokenizer.chat_template = file.metadata.get("tokenizer.chat_template")
    return tokenizer


def _pre_tokenizer(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by the name in `tokenizer.ggml.pre`."""

    def split_words(digits: str) -> pre_tokenizers.PreTokenizer:
        pattern = tokenizers.Regex(_WORDS.format(digits=digits))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    styles = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "gpt-2": byte_level,
        "llama-bpe": split_words("{1,3}"),
        "qwen2": split_words(""),
    }
    style = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if style not in styles:
        raise InputError(f"{file.path}: pre-tokenizer {style!r} is not supported{nearest(style, styles)}")
    return styles[style]


def _field(file: GgufFile, name: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        raise InputError(
            f"{file.path}: tokenizer.ggml.{name} is missing or malformed; the file has no usable tokenizer"
        )
    return value


def _special_names(file: GgufFile, vocab: list[str]) -> dict[str, str]:
    """Special tokens by transformers' names; padding falls back to the end of text."""
    fields = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {}
    for name, field in fields.items():
        index = file.metadata.get(f"tokenizer.ggml.{field}_token_id")
        if isinstance(index, int) and 0 <= index < len(vocab):
            names[name] = vocab[index]
    if "eos_token" in names:
        names.setdefault("pad_token", names["eos_token"])
    return names
