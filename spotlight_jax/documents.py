"""What a user calls a text (files, folders, globs, hub data sets, embedded names) to documents, one at a time."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spotlight_jax import text_files, texts
from spotlight_jax.config.data import EMBEDDED
from spotlight_jax.errors import InputError
from spotlight_jax.text_files import one_line

EMBEDDED_TEST = "embedded-test"  # every test text

_log = logging.getLogger(__name__)
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
    """Find every source behind the user's strings; nothing is read yet, but one that is missing raises InputError."""
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
        return _as_given(name, given, [path])
    if path.is_dir():
        return Source(name, given, 1.0, files=_search_folder(path, name))
    if glob.has_magic(name):
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise InputError(f"no file matches '{name}'")
        return _as_given(name, given, files)
    if _HUB_ID.fullmatch(name) and not text_files.is_known(path) and not path.parent.exists():
        return Source(name, given, 1.0, hub=_parse_hub_id(name))
    raise InputError(_missing(name, path))


def _as_given(name: str, given: int, files: Sequence[Path]) -> Source:
    for file in files:
        text_files.check_kind(file)
    return Source(name, given, 1.0, files=tuple(files))


def _search_folder(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files of a folder that are read, in order; a notice names the others."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file, folder))
    files = tuple(file for file in found if text_files.is_known(file))
    if not files:
        raise InputError(f"the folder '{name}' holds no text; {text_files.KINDS_READ}")
    if skipped := [str(file.relative_to(folder)) for file in found if file not in set(files)]:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        _log.warning("'%s': not read, by their suffix: %s%s", name, ", ".join(skipped[:5]), more)
    return files


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
    """Return SHA-256 of each file (or of each document of an embedded text): the identity of a local source."""
    if source.text is not None:
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts.read_text(source.text))
    hashes = []
    for file in source.files:
        try:
            with file.open("rb") as content:
                hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"cannot read '{file}': {error.strerror}") from error
    return tuple(hashes)


def read_source(source: Source, column: str) -> text_files.Documents:
    """Read a local source's documents in order: strings, None for a row whose text is null, arrays of `.npy` files."""
    if source.text is not None:
        yield from texts.read_text(source.text)
    for file in source.files:
        yield from text_files.read_file(file, column)


def next_row(rows: Iterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the next row of a stream, None at its end; raises InputError where it cannot be read on."""
    try:
        return next(rows, None)
    except Exception as error:  # of the network, of damaged files, of the library: each of a kind of its own
        raise InputError(f"cannot read on in '{name}': {one_line(error)}") from error


def open_stream(hub: HubId, column: str | None = None) -> Any:
    """Open the data set as a `datasets.IterableDataset`; raises InputError where it has no column of that name."""
    import datasets

    name = f"hf:{hub.path}"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its retries would bury the one line that tells what is wrong
    try:
        stream = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream.take(1)), {}))
    except ValueError as error:  # a split or config that is not there: the library names those that are
        raise InputError(f"cannot open '{name}': {one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot open '{name}': {one_line(error)}; check the name and the network") from error
    finally:
        log.setLevel(level)
    if column is not None and column not in columns:
        text_files.pick_text(dict.fromkeys(columns), column, name)  # raises
    return stream
