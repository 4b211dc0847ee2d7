"""LongBench's texts: from its files, a parquet mirror, or a hub id; and the prompts made of them."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers

from eval.longbench.predictions import check_answers
from eval.longbench.tasks import Task
from spotlight_jax import documents, text_files
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import encode_chat, encode_text

_HUB = "hf:"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question of a task."""

    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] | None
    length: int  # of the context, as the data set counts it: words, or characters of Chinese


def find_file(data: str, name: str) -> Path | None:
    """Find the file of a task in a folder by the names of LongBench and its mirrors; None where there is none."""
    root = Path(data).expanduser()
    patterns = (f"{name}.jsonl", f"data/{name}.jsonl", f"{name}.parquet", f"{name}-*.parquet", f"{name}/*.parquet")
    found = [file for pattern in (*patterns, f"data/{name}-*.parquet") for file in sorted(root.glob(pattern))]
    if len({file.parent for file in found}) > 1 or len(found) > 1:
        raise InputError(f"'{data}' has several files for {name}: {', '.join(map(str, found[:4]))}; keep one")
    return found[0] if found else None


def available_tasks(data: str, names: Iterable[str]) -> list[str]:
    """Return which of the tasks the data hold; a data set of the hub is taken to hold all.

    Raises: InputError where the folder is none, or holds no task.
    """
    if data.startswith(_HUB):
        return list(names)
    if not Path(data).expanduser().is_dir():
        raise InputError(f"'{data}' is no folder; give one of LongBench's files, or {_HUB}OWNER/NAME")
    if not (found := [name for name in names if find_file(data, name)]):
        raise InputError(f"the folder '{data}' holds no LongBench task (<task>.jsonl or <task>.parquet)")
    return found


def read_samples(data: str, name: str, limit: int | None = None) -> list[Sample]:
    """Read the questions of one task; raises InputError for what cannot be read, with file and line."""
    samples = [_parse(row, where) for row, where in itertools.islice(_read_rows(data, name), limit)]
    if not samples:
        raise InputError(f"'{data}' holds no question of {name}")
    return samples


def _read_rows(data: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    if data.startswith(_HUB):
        source = documents.HubId(data.removeprefix(_HUB), name, "test")
        rows = documents.open_stream(source)
        read_next = functools.partial(documents.next_row, iter(rows), data)
        yield from ((row, f"{data}:{name}:{number}") for number, row in enumerate(iter(read_next, None), start=1))
        return
    file = find_file(data, name)
    assert file is not None
    read = text_files.read_parquet_rows if file.suffix == ".parquet" else text_files.read_json_lines
    yield from read(file)


def _parse(row: dict[str, Any], where: str) -> Sample:
    question = row.get("input", row.get("question"))  # the parquet mirror's name for it
    answers, classes, length = row.get("answers"), row.get("all_classes"), row.get("length")
    texts = {"context": row.get("context"), "input": question}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"'{where}' has no text '{name}', only {', '.join(map(repr, row)) or 'nothing'}")
    check_answers(answers, classes, length, where)
    if length is None:
        raise InputError(f"'{where}': 'length' is not a whole number of words but None")
    return Sample(row["context"], str(question), tuple(row["answers"]), tuple(classes) if classes else None, length)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and whether the middle had to be left out."""

    tokens: tuple[int, ...]
    is_cut: bool


def chat_tokens(tokenizer: transformers.PreTrainedTokenizerBase, vocab: int) -> int:
    """Return tokens that the chat template adds to a prompt; 0 for a model without one."""
    return len(encode_chat(tokenizer, [{"role": "user", "content": ""}], vocab)) if tokenizer.chat_template else 0


def encode_prompt(
    tokenizer: transformers.PreTrainedTokenizerBase,
    vocab: int,
    task: Task,
    sample: Sample,
    max_length: int,
    capacity: int,
    chat: bool,
) -> Prompt:
    """Encode a question as the model is asked it.

    As published, a prompt of more than `max_length` tokens keeps its first and last halves of that, and what is left
    goes into the chat template (not for few-shot and code tasks, nor for models without one).

    Args:
        tokenizer: of the model.
        vocab: rows of the model's embedding.
        task: gives the prompt of the question.
        sample: the question.
        max_length: see above.
        capacity: most tokens of all; the template and the seam between the halves may take a few more than was left.
        chat: whether to use the template.
    """
    text = task.prompt.format(context=sample.context, input=sample.question)
    tokens = encode_text(tokenizer, text, vocab)
    is_cut = len(tokens) > max_length
    if is_cut:
        half = max_length // 2
        text = "".join(
            str(tokenizer.decode(part, skip_special_tokens=True)) for part in (tokens[:half], tokens[-half:])
        )
    if chat and task.is_chat and tokenizer.chat_template:
        tokens = encode_chat(tokenizer, [{"role": "user", "content": text}], vocab)
    elif is_cut:
        tokens = encode_text(tokenizer, text, vocab)
    if len(tokens) > capacity:
        tokens = tokens[: capacity // 2] + tokens[len(tokens) - (capacity - capacity // 2) :]
    return Prompt(tuple(tokens), is_cut)
