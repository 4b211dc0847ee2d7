"""Documents to token ids: in pieces that many cores share, once, kept in the cache folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spotlight_jax import documents, texts
from spotlight_jax.documents import Source
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import check_ids, check_text

_FORMAT = 2  # raised when packing changes, so that old token caches are not read
_PIECE_CHARS = 100_000  # a batch of pieces this long keeps every core busy
_BATCH_CHARS = 4_000_000

# Byte-level BPE tokenises both sides of these places alone as it does together: after a single line break, or before a
# single space, between two visible characters.
_SEAMS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


class Encoder:
    """A tokenizer of `transformers` or `tokenizers`, or none where every text is token ids already."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None, progress: texts.Progress | None = None) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._eos = getattr(tokenizer, "eos_token_id", None)
        self._progress = progress
        self._slow = None if self._backend is None or hasattr(self._backend, "encode_batch") else tokenizer
        known = None
        if tokenizer is not None:
            known = len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()
        self._vocab_size = vocab_size if vocab_size is not None else known
        self._largest_id = max(known or 0, vocab_size or 0)

    def identity(self) -> str:
        """SHA-256 of what decides the ids."""
        if self._slow is not None:
            table = str(sorted(self._slow.get_vocab().items()))
        else:
            table = "none" if self._backend is None else self._backend.to_str()
        return hashlib.sha256(f"{_FORMAT}\n{self._eos}\n{table}".encode()).hexdigest()

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each document, ending with the tokenizer's end-of-text id if it has one.

        Raises InputError where a document is not valid Unicode, or gives ids that the model has no row for.
        """
        pieces = [split_document(document) for document in batch]
        flat = iter(self._encode_pieces([piece for document in pieces for piece in document]))
        end = [] if self._eos is None else [np.array([self._eos], np.uint32)]
        return [np.concatenate([next(flat) for _ in document] + end) for document in pieces]

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        if self._backend is None:
            raise InputError("text needs a tokenizer, and the model has none; give .npy files of token ids")
        for piece in pieces:
            check_text(piece, "a document")
        if self._slow is not None:
            ids = self._slow(pieces, add_special_tokens=False)["input_ids"]
        else:
            encode_batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
            ids = [encoding.ids for encoding in encode_batch(pieces, add_special_tokens=False)]
        found = [np.array(row, np.uint32) for row in ids]
        for row in (*found, np.array([] if self._eos is None else [self._eos], np.uint32)):
            check_ids(row, self._vocab_size or self._largest_id, self._tokenizer)
        return found

    def load(self, source: Source, hashes: Sequence[str], column: str) -> np.ndarray:
        """A local source's token ids, mapped from the cache; tokenised first if they are not there."""
        if len(source.files) == 1 and source.files[0].suffix == ".npy":
            return self._check_ids(documents.read_token_ids(source.files[0]), source.files[0])
        key = "\n".join([self.identity(), column, str(self._vocab_size), *hashes])
        path = texts.cache_dir() / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if not path.exists():
            dtype = np.dtype(np.uint16 if self._largest_id <= 1 << 16 else np.uint32)
            _write_ids(path, self._encode_source(source, column), dtype)
        return np.load(path, mmap_mode="r")

    def _encode_source(self, source: Source, column: str) -> Iterator[np.ndarray]:
        files = iter(source.files)
        total = source_size(source)
        done = 0
        for batch in _batches(documents.read_source(source, column)):
            for document in batch if isinstance(batch, list) else ():
                done += len(document)
            if isinstance(batch, np.ndarray):
                file = next(file for file in files if file.suffix == ".npy")
                yield self._check_ids(batch, file)
            else:
                yield from self.encode(batch)
            if self._progress is not None:
                self._progress(f"tokenising {source.name}", min(done, total), total)

    def _check_ids(self, ids: np.ndarray, file: Path) -> np.ndarray:
        if self._vocab_size is None:
            raise InputError(f"'{file}' holds token ids, but the size of the model's vocabulary is not known")
        if ids.size == 0:
            raise InputError(f"'{file}' is empty")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise InputError(
                f"'{file}' holds token id {low if low < 0 else high}, but the model's vocabulary is "
                f"0 to {self._vocab_size - 1}; tokenise it with this model's tokenizer"
            )
        return ids


def source_size(source: Source) -> int:
    """About how many characters a local source holds, for progress."""
    if source.text is not None:
        return sum(len(document) for document in texts.read_text(source.text))
    return sum(file.stat().st_size for file in source.files)


def split_document(text: str, size: int = _PIECE_CHARS) -> list[str]:
    """Pieces of about `size` characters, cut where a tokenizer starts afresh anyway, if there is such a place."""
    pieces = []
    start = 0
    while len(text) - start > size:
        found = (seam.search(text, start + size, start + 2 * size) for seam in _SEAMS)
        end = next((place.end() for place in found if place), start + size)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _batches(stream: Iterable[str | np.ndarray]) -> Iterator[list[str] | np.ndarray]:
    batch: list[str] = []
    size = 0
    for document in stream:
        if isinstance(document, np.ndarray):
            if batch:
                yield batch
            yield document
            batch, size = [], 0
            continue
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_ids(path: Path, parts: Iterator[np.ndarray], dtype: np.dtype) -> None:
    """Write a `.npy` file of unknown length; its name appears only when all ids are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_name(f"{path.name}.{os.getpid()}.raw")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        count = 0
        with raw.open("wb") as ids:
            for part in parts:
                ids.write(part.astype(dtype).tobytes())
                count += len(part)
        with partial.open("wb") as whole, raw.open("rb") as ids:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(whole, header)
            while block := ids.read(1 << 24):
                whole.write(block)
        os.replace(partial, path)
    finally:
        raw.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
