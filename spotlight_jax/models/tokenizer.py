"""Tokenizers: a folder's own, or one built from a GGUF file's metadata. None of it needs torch."""

import contextlib
import importlib.util
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from spotlight_jax.errors import InputError, first_line, naming
from spotlight_jax.models.config import nearest
from spotlight_jax.models.gguf_file import GgufFile

# how LLaMA 3 and Qwen2 cut text before merging; they differ in the run of digits
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # its first line: a token in base64, and its rank
_NO_SENTENCEPIECE = "tokenizer.model is damaged, or no sentencepiece file; fetch it again"
# modules that only name the type import it from here: this package keeps transformers from reporting torch missing
Tokenizer = transformers.PreTrainedTokenizerBase
_SPECIAL, _USER_DEFINED = 3, 4  # token types of the GGUF specification


def load_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a folder in Hugging Face's layout.

    Code that the folder holds is never run: left to itself, transformers would ask on standard input whether to, where
    prompts come from.

    Raises InputError naming the folder when there is none, it cannot be read, or it needs code of its own.
    """
    # from config.json alone transformers would make a tokenizer without a vocabulary
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise InputError(f"{folder}: holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    if is_sentencepiece := _has_only_sentencepiece(folder):
        _check_sentencepiece(folder)
    try:
        with _one_line_errors(folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except InputError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise InputError(
                f"{folder}: its tokenizer needs code of its own (auto_map), which is never run; convert it to "
                "tokenizer.json where you trust that code, and leave auto_map out of its configs"
            ) from error
        if is_sentencepiece:  # transformers would ask for tiktoken
            raise InputError(f"{folder}: {_NO_SENTENCEPIECE}") from error
        raise
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise InputError(f"{folder}: its tokenizer cannot be loaded: it is a {type(tokenizer).__name__}")
    return tokenizer


def _has_only_sentencepiece(folder: pathlib.Path) -> bool:
    """Whether the one vocabulary of a folder is a tokenizer.model that is no tiktoken file."""
    if any((folder / name).exists() for name in _VOCABULARIES if name != "tokenizer.model"):
        return False
    with _one_line_errors(folder):
        return _TIKTOKEN.match((folder / "tokenizer.model").read_bytes()) is None


def _check_sentencepiece(folder: pathlib.Path) -> None:
    """Raise InputError where the packages that read a sentencepiece file are missing, or the file is not whole."""
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]:
        raise InputError(
            f"{folder}: reading tokenizer.model without tokenizer.json needs {' and '.join(missing)}; run "
            "pip install sentencepiece protobuf"
        )
    import sentencepiece  # no dependency: few folders hold this file alone

    try:
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: {_NO_SENTENCEPIECE}") from error


@contextlib.contextmanager
def _one_line_errors(source: object) -> Iterator[None]:
    """Raise InputError for what a tokenizer library raises of files that are missing, cut short or of no use.

    What transformers logs about them on the way is left out: the error is the one line.
    """
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library's is none of Exception
        raise InputError(f"{source}: its tokenizer cannot be loaded: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def tokenizer_from_gguf(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file's `tokenizer.ggml.*` metadata describes.

    Raises InputError when the metadata is missing or of a kind that is not implemented.
    """
    with naming(file.path), _one_line_errors(file.path):
        return _build(file)


def _build(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
    kind = _field(file, "model", str)
    if kind != "gpt2":
        raise InputError(f"tokenizer type {kind!r} is not supported; supported: gpt2 (byte-level BPE)")
    vocab, merges, types = (_texts(file, "tokens"), _texts(file, "merges"), _field(file, "token_type", list))
    if len(types) != len(vocab):
        raise InputError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(vocab)} tokens")
    style, cut = _pre_tokenizer(file)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocab)},
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            ignore_merges=style == "llama-bpe",  # LLaMA 3 looks a whole word up first
        )
    )
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
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
    length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=length if isinstance(length, int) else 1 << 30,
        **names,
    )
    template = file.metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _pre_tokenizer(file: GgufFile) -> tuple[str, pre_tokenizers.PreTokenizer]:
    """Return the name in `tokenizer.ggml.pre`, and how text is cut before merging by it."""

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
    style = file.metadata.get("tokenizer.ggml.pre", "default")
    if style == "default":  # what converters write, or left out, for a tokenizer that they do not know
        raise InputError(
            "the file does not say how its text is cut into words (tokenizer.ggml.pre is 'default' or missing); "
            "convert the model again with a current llama.cpp, or use its Hugging Face folder"
        )
    if not isinstance(style, str) or style not in styles:
        raise InputError(f"pre-tokenizer {style!r} is not supported{nearest(style, styles)}")
    return style, styles[style]


def _texts(file: GgufFile, name: str) -> list[str]:
    found = _field(file, name, list)
    if not all(isinstance(text, str) for text in found):
        raise InputError(f"tokenizer.ggml.{name} holds entries that are no texts; the file has no usable tokenizer")
    return found


def _field(file: GgufFile, name: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        raise InputError(f"tokenizer.ggml.{name} is missing or malformed; the file has no usable tokenizer")
    return value


def _special_names(file: GgufFile, vocab: list[str]) -> dict[str, str]:
    """Return special tokens by transformers' names; padding falls back to the end of text."""
    fields = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {}
    for name, field in fields.items():
        index = file.metadata.get(f"tokenizer.ggml.{field}_token_id")
        if isinstance(index, int) and 0 <= index < len(vocab):
            names[name] = vocab[index]
    if "eos_token" in names:
        names.setdefault("pad_token", names["eos_token"])
    return names
