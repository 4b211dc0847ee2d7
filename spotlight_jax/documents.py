"""What a user calls a text (files, folders, globs, hub data sets, embedded names) to documents, one at a time."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spotlight_jax import texts
from spotlight_jax.errors import InputError

KNOWN_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", ".npy")
EMBEDDED = "embedded"  # the whole training mix
EMBEDDED_TEST = "embedded-test"  # every test text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.+%-]+){0,2}")


@dataclasses.dataclass(frozen=True)
class HubId:
    """A data set on the Hugging Face hub (or a folder of one), read as a stream."""

    path: str
    config: str | None
    split: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One text that is tokenised, held out and shuffled as a whole. Exactly one of the last three is set."""

    name: str  # as errors and tables call it
    given: int  # position of the string it came from
    share: float  # of that string's weight
    files: tuple[Path, ...] = ()
    text: str | None = None
    hub: HubId | None = None


def find_sources(names: Sequence[str]) -> list[Source]:
    """Every source behind the user's strings; nothing is read yet, but missing ones are told."""
    found: list[Source] = []
    for given, name in enumerate(names):
        if name in (EMBEDDED, EMBEDDED_TEST):
            parts = texts.TRAINING_TEXTS if name == EMBEDDED else texts.TEST_TEXTS
            total = sum(max(texts.TEXTS[part].weight, 1) for part in parts)
            for part in parts:
                share = max(texts.TEXTS[part].weight, 1) / total
                found.append(Source(f"text:{part}", given, share, text=part))
        elif name.startswith("text:"):
            part = texts.find_text(name.removeprefix("text:")).name
            found.append(Source(name, given, 1.0, text=part))
        elif name.startswith("hf:"):
            found.append(Source(name, given, 1.0, hub=_parse_hub_id(name.removeprefix("hf:"))))
        else:
            found.append(_find_path(name, given))
    return found


def _parse_hub_id(name: str) -> HubId:
    path, *rest = name.split(":")
    if not path or len(rest) > 2:
        raise InputError(f"'hf:{name}' is not a data set; write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return HubId(path, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")


def _find_path(name: str, given: int) -> Source:
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name, given, 1.0, files=(path,))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in KNOWN_SUFFIXES and not _is_hidden(file, path))
        if not files:
            raise InputError(f"the folder '{name}' holds no text; files read are {', '.join(KNOWN_SUFFIXES)}")
        return Source(name, given, 1.0, files=tuple(files))
    if glob.has_magic(name):
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise InputError(f"no file matches '{name}'")
        return Source(name, given, 1.0, files=tuple(files))
    if _HUB_ID.fullmatch(name) and path.suffix not in KNOWN_SUFFIXES and not path.parent.exists():
        return Source(name, given, 1.0, hub=_parse_hub_id(name))
    raise InputError(_missing(name, path))


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _missing(name: str, path: Path) -> str:
    if "/" not in name:
        known = [EMBEDDED, EMBEDDED_TEST, *(f"text:{text}" for text in texts.TEXTS)]
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            return f"there is no text '{name}'; did you mean '{near[0]}'?"
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean '{path.with_name(near[0])}'?" if near else "a data set of the hub is written hf:NAME"
    return f"no such file or folder: '{name}'; {hint}"


def hash_source(source: Source) -> tuple[str, ...]:
    """SHA-256 of each file (or of each document of an embedded text): the identity of a local source."""
    if source.text is not None:
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts.read_text(source.text))
    hashes = []
    for file in source.files:
        with _open(file) as content:
            hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
    return tuple(hashes)


def read_source(source: Source, column: str) -> Iterator[str | np.ndarray]:
    """Documents of a local source in order: strings, or an array for each `.npy` file."""
    if source.text is not None:
        yield from texts.read_text(source.text)
    for file in source.files:
        yield from _read_file(file, column)


def _read_file(file: Path, column: str) -> Iterator[str | np.ndarray]:
    with _open(file) as content:
        if not content.read(1):
            raise InputError(f"'{file}' is empty")
    if file.suffix == ".npy":
        yield read_token_ids(file)
    elif file.suffix == ".jsonl":
        yield from _read_jsonl(file, column)
    elif file.suffix == ".parquet":
        yield from _read_parquet(file, column)
    else:
        yield _decode(file.read_bytes(), str(file))


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"cannot read '{file}': {error.strerror}") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"'{where}' is not UTF-8 (byte {error.start}); convert it with iconv -t utf-8") from error


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    for row, where in read_json_lines(file):
        yield _pick(row, column, where)


def read_json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file with one on each line, and where each is; raises InputError that names file and line."""
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise InputError(f"'{where}' is not JSON ({error.msg}, column {error.colno})") from error
            if not isinstance(row, dict):
                raise InputError(f"'{where}' is not a JSON object; each line must be one")
            yield row, where


def _pick(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise InputError(f"'{where}' has no '{column}', only {_quoted(row)}; name the text's with text_column")
    if not isinstance(row[column], str):
        raise InputError(f"'{where}': '{column}' is not text but {type(row[column]).__name__}")
    return row[column]


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in list(names)[:8]) or "nothing"


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"'{file}' is not a readable parquet file: {reason}") from error
    with table:
        if column not in table.schema_arrow.names:
            columns = _quoted(table.schema_arrow.names)
            raise InputError(f"'{file}' has no '{column}', only {columns}; name the text's with text_column")
        kind = table.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"'{file}': '{column}' is not text but {kind}")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def read_token_ids(file: Path) -> np.ndarray:
    """A `.npy` file of token ids, mapped and not copied."""
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"'{file}' is not a readable .npy file of token ids") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"'{file}' must be one row of integer token ids, not {ids.dtype}{list(ids.shape)}")
    return ids


def open_stream(hub: HubId, column: str) -> Any:
    """The data set as a `datasets.IterableDataset` with the text in a column of that name."""
    import datasets

    name = f"hf:{hub.path}"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its retries would bury the one line that tells what is wrong
    try:
        stream = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream.take(1)), {}))
    except ValueError as error:  # a split or config that is not there: the library names those that are
        raise InputError(f"cannot open '{name}': {_one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot open '{name}': {_one_line(error)}; check the name and the network") from error
    finally:
        log.setLevel(level)
    if column not in columns:
        raise InputError(f"'{name}' has no '{column}', only {_quoted(columns)}; name the text's with text_column")
    return stream


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
