"""Documents to token ids: in pieces that many cores share, once, kept in the cache folder."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spotlight_jax import documents, texts
from spotlight_jax.derived import Derived, find_derived, write_derived
from spotlight_jax.documents import Source
from spotlight_jax.errors import InputError
from spotlight_jax.text_files import Documents, find_kind, holds_token_ids, read_token_ids
from spotlight_jax.token_ids import check_ids, check_text

_FORMAT = 3  # raised when packing changes, so that old token caches are not read
_log = logging.getLogger(__name__)
_PIECE_CHARS = 100_000  # a batch of pieces this long keeps every core busy
_BATCH_CHARS = 4_000_000

# Many tokenizers tokenise both sides of these places alone as they do together: after a single line break, or before a
# single space, between two visible characters. Each place is tried with the text around it before it is used, because
# others do not: SentencePiece puts a space before whatever a text begins with.
_SEAM_CONTEXT = 400  # characters on each side of a place that is tried
_SEAM_TRIES = 4  # places of each kind that are tried before a document is left whole
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
        self._start = [] if tokenizer is None else self._start_ids()

    def identity(self) -> str:
        """Return SHA-256 of what decides the ids."""
        if self._slow is not None:
            table = str(sorted(self._slow.get_vocab().items()))
        else:
            table = "none" if self._backend is None else self._backend.to_str()
        return hashlib.sha256(f"{_FORMAT}\n{self._start}\n{self._eos}\n{table}".encode()).hexdigest()

    def _start_ids(self) -> list[int]:
        """Return what the tokenizer puts before a text (its BOS, if it adds one), as generation does with a prompt."""
        if self._slow is not None:
            whole, bare = self._slow("a")["input_ids"], self._slow("a", add_special_tokens=False)["input_ids"]
        else:
            whole, bare = self._backend.encode("a").ids, self._backend.encode("a", add_special_tokens=False).ids
        places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
        return list(whole[: places[0]]) if bare and places else []

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        """Return token ids of each document, between the BOS that the tokenizer adds, if any, and its end-of-text id.

        Raises InputError where a document is not valid Unicode, or gives ids that the model has no row for.
        """
        pieces = [split_document(document, is_seam=self._is_seam) for document in batch]
        flat = iter(self._encode_pieces([piece for document in pieces for piece in document]))
        start = np.array(self._start, np.uint32)
        end = np.array([] if self._eos is None else [self._eos], np.uint32)
        return [np.concatenate([start, *(next(flat) for _ in document), end]) for document in pieces]

    def _is_seam(self, before: str, after: str) -> bool:
        """Whether two texts have alone the tokens that they have together."""
        first, second, both = self._encode_pieces([before, after, before + after])
        return np.array_equal(np.concatenate([first, second]), both)

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
        """Load a local source's token ids, mapped from the cache; tokenised first if they are not there."""
        if len(source.files) == 1 and holds_token_ids(source.files[0]):
            return self._check_ids(read_token_ids(source.files[0]), source.files[0])
        kinds = [find_kind(file) for file in source.files]
        key = "\n".join([self.identity(), column, str(self._vocab_size), *hashes, *kinds])
        path = texts.cache_dir() / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if (found := find_derived(path)) is None:
            dtype = np.dtype(np.uint16 if self._largest_id <= 1 << 16 else np.uint32)
            nulls = NullCount(source.name, column)
            found = _write_ids(path, self._encode_source(source, column, nulls), dtype, nulls.note)
        if found.note:
            _log.warning(found.note)
        return np.load(path, mmap_mode="r")

    def _encode_source(self, source: Source, column: str, nulls: NullCount) -> Iterator[np.ndarray]:
        files = iter(source.files)
        total = source_size(source)
        done = 0
        for batch in _batches(nulls.skip(documents.read_source(source, column))):
            for document in batch if isinstance(batch, list) else ():
                done += len(document)
            if isinstance(batch, np.ndarray):
                file = next(file for file in files if holds_token_ids(file))
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


class NullCount:
    """Rows of one text that hold null instead of a text: they are left out and counted, and a notice says how many."""

    def __init__(self, name: str, column: str) -> None:
        self._name, self._column = name, column
        self.count = 0

    def skip(self, stream: Documents) -> Iterator[str | np.ndarray]:
        """Yield the documents without the nulls."""
        for document in stream:
            if document is None:
                self.count += 1
            else:
                yield document

    def note(self) -> str:
        """Return how many there were so far, in a sentence; nothing if there were none."""
        rows = "1 row is" if self.count == 1 else f"{self.count} rows are"
        return f"'{self._name}': {rows} left out, because '{self._column}' is null" if self.count else ""


def source_size(source: Source) -> int:
    """Return about how many characters a local source holds, for progress."""
    if source.text is not None:
        return sum(len(document) for document in texts.read_text(source.text))
    return sum(file.stat().st_size for file in source.files)


def split_document(
    text: str, size: int = _PIECE_CHARS, is_seam: Callable[[str, str], bool] = lambda before, after: True
) -> list[str]:
    """Split a text into pieces of at least `size` characters, cut only where the tokens stay the same.

    Args:
        size: a cut is made at the first safe place after so many characters.
        is_seam: whether the text before a place and the text after it have alone the tokens that they have together.
    """
    pieces = []
    start = 0
    while (end := _find_seam(text, start + size, size, is_seam)) < len(text):
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _find_seam(text: str, start: int, size: int, is_seam: Callable[[str, str], bool]) -> int:
    """Return the first safe place from `start` on; the text's end where there is none, or where those tried fail."""
    for begin in range(start, len(text), size):
        found = [itertools.islice(seam.finditer(text, begin, begin + size + 1), _SEAM_TRIES) for seam in _SEAMS]
        places = [match.end() for matches in found for match in matches]
        for place in places:
            if is_seam(text[max(0, place - _SEAM_CONTEXT) : place], text[place : place + _SEAM_CONTEXT]):
                return place
        if places:
            break
    return len(text)


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


def _write_ids(path: Path, parts: Iterator[np.ndarray], dtype: np.dtype, note: Callable[[], str]) -> Derived:
    """Write a `.npy` file of unknown length; its name appears only when all ids are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as ids:
        count = 0
        for part in parts:
            ids.write(part.astype(dtype).tobytes())
            count += len(part)
        header = io.BytesIO()
        shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(header, shape)
        ids.seek(0)
        blocks = iter(lambda: ids.read(1 << 24), b"")
        return write_derived(path, itertools.chain([header.getvalue()], blocks), note)
