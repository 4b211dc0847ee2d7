"""Files to documents: which reader a file's suffixes choose, and the one rule of what text is.

A byte order mark is left out and CRLF line ends become LF, in every kind of file. A row whose text is null is no
document; the reader yields None for it, so that the caller can count it. What cannot be read raises InputError with one
line that names the file and, where there are rows, the row.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from spotlight_jax.errors import InputError

Documents = Iterator[str | np.ndarray | None]
Row = dict[str, Any]

_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")  # what a folder is searched for; other names must be given
_FOREIGN = re.compile(
    r"\.(zip|tar|tgz|7z|rar|lz4|br|arrow|feather|avro|orc|npz|pkl|pickle|pt|bin|safetensors|gguf|h5|sqlite|db|pdf|docx?"
    r"|odt|epub|xlsx?|ods|ipynb|ya?ml|toml|geojson|png|jpe?g)"
)
_CSV_BLOCK = 1 << 26  # bytes; a row of a CSV file must fit into one block
NAME_THE_COLUMN = "name the one that holds the text with --text-column (--data.text-column in training)"
_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def find_kind(file: Path) -> str:
    """Return the suffix that says how a file is read, in lower case and without that of a compression."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in _COMPRESSIONS else suffix


def is_known(file: Path) -> bool:
    """Whether a folder's file is read: by its suffix, in any case, compressed or not."""
    return find_kind(file) in KNOWN_SUFFIXES


def holds_token_ids(name: str | Path) -> bool:
    """Whether a name is that of a file of token ids."""
    return Path(name).suffix.lower() == ".npy"


def check_kind(file: Path) -> None:
    """Raise InputError for a file that was given by name and is of a kind that is not read."""
    kind = find_kind(file)
    if _FOREIGN.fullmatch(kind):
        raise InputError(f"'{file}': {kind} files are not read as text; {KINDS_READ}")
    if kind in (".npy", ".parquet") and file.suffix.lower() in _COMPRESSIONS:
        raise InputError(f"'{file}': {kind} files are read uncompressed; unpack it first")


def read_file(file: Path, column: str) -> Documents:
    """Read the documents of a file in order: strings, None for each null, or one array of token ids."""
    check_kind(file)
    with open_content(file) as content:
        if not content.read(1):
            raise InputError(f"'{file}' is empty")
    if (reader := _READERS.get(find_kind(file))) is None:
        yield read_text(file)
    else:
        yield from reader(file, column)


def read_text(file: Path) -> str:
    """Read a whole file as one text, whatever its kind; decompressed where its suffix says so."""
    with open_content(file) as content:
        text = decode_text(content.read(), f"'{file}'")
    if "\0" in text:
        raise InputError(f"'{file}' holds null characters and is no text")
    return text


@contextlib.contextmanager
def open_content(file: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed where its suffix says so; errors of opening and reading name the file."""
    try:
        with _COMPRESSIONS.get(file.suffix.lower(), _open_plain)(file) as content:
            yield content
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"'{file}' is damaged: {one_line(error)}") from error
    except FileNotFoundError as error:
        raise InputError(f"'{file}': no such file") from error
    except OSError as error:
        raise InputError(f"cannot read '{file}': {error.strerror or one_line(error)}") from error


def decode_text(content: bytes, where: str) -> str:
    """Decode UTF-8, without a byte order mark and with LF line ends: the rule for files, prompts and pipes alike."""
    try:
        return clean_text(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = "convert it with iconv -t utf-8"
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = "it is UTF-16, convert it with iconv -f utf-16 -t utf-8"
        elif b"\0" in content:
            hint = "it holds null bytes and is no text"
        raise InputError(f"{where} is not UTF-8 (byte {error.start}); {hint}") from error


def clean_text(text: str) -> str:
    """Return a text without a byte order mark and with LF line ends."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def pick_text(row: Row, column: str, where: str) -> str | None:
    """Return a row's text, or None where it is null; raises InputError for a row without it and for other types."""
    if column not in row:
        raise InputError(f"'{where}' has no '{column}', only {_quoted(row)}; {NAME_THE_COLUMN}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise InputError(f"'{where}': '{column}' is not text but {type(text).__name__}")
    if text is not None and not is_unicode(text):
        raise InputError(f"'{where}': '{column}' is not valid Unicode (it holds half of a surrogate pair)")
    return None if text is None else clean_text(text)


def is_unicode(text: str) -> bool:
    """Whether a string is text: JSON's escapes can spell half of a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON value; raises InputError that says where and why there is none."""
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"'{where}' is not JSON ({error.msg}, {place})") from error
    except UnicodeEncodeError as error:
        raise InputError(f"'{where}' is not valid Unicode (it holds half of a surrogate pair)") from error
    except RecursionError as error:
        raise InputError(f"'{where}' is JSON that is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"'{where}' is not usable JSON ({one_line(error)})") from error
    return value


def json_line(row: Row, default: Callable[[Any], Any] | None = None) -> str:
    """Return a row as one line of JSON, readable; also one line to readers that split at Unicode's line separators."""
    return json.dumps(row, ensure_ascii=False, default=default).translate(_SEPARATORS) + "\n"


def split_lines(text: str) -> list[str]:
    """Split a text into lines without their ends, at LF alone: other separators may stand in a JSON string."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json_lines(file: Path) -> Iterator[tuple[Row, str]]:
    """Read a file with an object on each line, and where each is; raises InputError that names file and line."""
    with open_content(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            row = parse_json(decode_text(line, f"'{where}'"), where)
            if not isinstance(row, dict):
                raise InputError(f"'{where}' is not a JSON object; each line must be one")
            yield row, where


def _read_json_array(file: Path) -> Iterator[tuple[Row, str]]:
    """Read the objects of a JSON array, the only object of a file, or those of JSON lines under the name of JSON."""
    text = read_text(file)
    if not text.lstrip().startswith("["):
        try:
            rows = [parse_json(text, str(file))]
        except InputError as error:
            if getattr(error.__cause__, "msg", "") != "Extra data":
                raise
            yield from read_json_lines(file)
            return
    else:
        rows = parse_json(text, str(file))
    for number, row in enumerate(rows, start=1):
        where = f"{file}:{number}"
        if not isinstance(row, dict):
            raise InputError(f"'{where}' is not a JSON object; each element of the array must be one")
        yield row, where


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield table
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"'{file}' is not a readable parquet file: {one_line(error)}") from error


def read_parquet_rows(file: Path) -> Iterator[tuple[Row, str]]:
    """Read the rows of a parquet file as dicts, and where each is."""
    with _open_parquet(file) as table:
        rows = (row for batch in table.iter_batches(batch_size=64) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield row, f"{file}:{number}"


def _read_parquet(file: Path, column: str) -> Documents:
    import pyarrow as pa

    with _open_parquet(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise InputError(f"'{file}' has no '{column}', only {_quoted(names)}; {NAME_THE_COLUMN}")
        kind = table.schema_arrow.field(names.index(column)).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)):
            raise InputError(f"'{file}': '{column}' is not text but {kind}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield pick_text({column: text}, column, f"{file}:{number}")


def _read_csv_rows(file: Path, column: str, delimiter: str) -> Iterator[tuple[Row, str]]:
    import pyarrow as pa
    from pyarrow import csv

    convert = csv.ConvertOptions(
        include_columns=[column], column_types={column: pa.string()}, strings_can_be_null=False
    )
    try:
        with (
            open_content(file) as content,
            csv.open_csv(
                content,
                read_options=csv.ReadOptions(block_size=_CSV_BLOCK),
                parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=convert,
            ) as table,
        ):
            number = 0
            for batch in table:
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}:{number}"
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"'{file}' has no '{column}' in its first line; {NAME_THE_COLUMN}") from error
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"'{file}' is not readable CSV: {one_line(error)}") from error


def read_token_ids(file: Path) -> np.ndarray:
    """Map a `.npy` file of token ids; nothing is copied."""
    try:
        ids = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # NumPy parses the header as Python and raises many kinds for a damaged one
        raise InputError(f"'{file}' is not a readable .npy file of token ids") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"'{file}' must be one row of integer token ids, not {ids.dtype}{list(ids.shape)}")
    return ids


def _read_ids(file: Path, column: str) -> Documents:
    yield read_token_ids(file)


def _pick_from(read_rows: Callable[[Path], Iterator[tuple[Row, str]]]) -> Callable[[Path, str], Documents]:
    return lambda file, column: (pick_text(row, column, where) for row, where in read_rows(file))


def _read_csv(file: Path, column: str) -> Documents:
    delimiter = "\t" if find_kind(file) == ".tsv" else ","
    return (pick_text(row, column, where) for row, where in _read_csv_rows(file, column, delimiter))


_READERS: dict[str, Callable[[Path, str], Documents]] = {
    ".jsonl": _pick_from(read_json_lines),
    ".ndjson": _pick_from(read_json_lines),
    ".json": _pick_from(_read_json_array),
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".npy": _read_ids,
}
KNOWN_SUFFIXES = (*_PLAIN, *_READERS)
KINDS_READ = f"files read are {', '.join(KNOWN_SUFFIXES)}, the text among them also with {', '.join(_COMPRESSIONS)}"


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in list(names)[:8]) or "nothing"


def one_line(error: Exception) -> str:
    """Return an exception's message on one line, not too long; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
