"""Prompts continued: texts on stdout, what it took on stderr."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spotlight_jax.commands.generate import GenerateCommandConfig
from spotlight_jax.commands.session import decode, describe, load_fitting, read_configs
from spotlight_jax.commands.terminal import write_text
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import Run, encode_prompts, make_engine
from spotlight_jax.models.load import BaseModel, open_tokenizer
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.text_files import decode_text, read_json_lines, read_text

STDIN = Path("-")


def main(cfg: GenerateCommandConfig) -> dict[str, Any]:
    """Run the command; returns what `--json` prints."""
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    use_compile_cache()
    texts = _read_texts(cfg)
    if cfg.stream and len(texts) > 1:
        raise InputError(f"--stream shows one text; {len(texts)} prompts were given")
    name, model_cfg, selector = read_configs(cfg, notes)
    max_new = cfg.generation.max_new_tokens
    prompts = encode_prompts(open_tokenizer(name), texts, max_new, model_cfg, cfg.chat, cfg.prompt_tokens)
    model, engine = load_fitting(cfg, name, model_cfg, selector, [len(prompt) for prompt in prompts], notes)
    run, result = _generate(cfg, model, engine, prompts, selector, notes)
    if cfg.compare:
        dense = make_engine(model, cfg.generation)
        result = {"sparse": result, "dense": _generate(cfg, model, dense, prompts, None, notes, run)[1]}
        if not cfg.json:
            console.print(_side_by_side(result))
    if cfg.json:
        head = {"command": "generate", "model": name}
        for row in [head | result] if cfg.prompts is None else _rows(head, result, len(texts)):
            print(json.dumps(row))
    return result


def _read_texts(cfg: GenerateCommandConfig) -> list[str]:
    """Return the prompts: of JSON lines, or those given and those in files, or else what is piped in."""
    if cfg.prompts is not None:
        return _read_rows(cfg.prompts)
    files = cfg.prompt_file if cfg.prompt or cfg.prompt_file or sys.stdin.isatty() else (STDIN,)
    texts = [*cfg.prompt, *(_read_text(path) for path in files)]
    if not texts:
        raise InputError("there is no prompt; give --prompt TEXT or --prompt-file FILE, or pipe one in")
    return texts


def _read_rows(file: Path) -> list[str]:
    """Return the prompts of a file of JSON lines; raises InputError that names the line of one that is none."""
    texts = []
    for row, where in read_json_lines(file):
        text = row.get("prompt")
        if not isinstance(text, str) or not text:
            told = "has no 'prompt'" if "prompt" not in row else f"has {text!r:.40} as its 'prompt'"
            raise InputError(f'\'{where}\' {told}; each line needs a text there, such as {{"prompt": "Once"}}')
        texts.append(text)
    if not texts:
        raise InputError(f"'{file}' holds no prompts")
    return texts


def _rows(head: dict[str, Any], result: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt: its number from 0, its own result, and the report, which is about all of them."""

    def of_one(found: dict[str, Any], index: int) -> dict[str, Any]:
        return found["results"][index] | {name: value for name, value in found.items() if name != "results"}

    for index in range(count):
        own = of_one(result, index) if "results" in result else {way: of_one(result[way], index) for way in result}
        yield head | {"index": index} | own


def _read_text(path: Path) -> str:
    """Read a text file as training text is read; what is piped in loses its last newline."""
    if path != STDIN:
        return read_text(path)
    return decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def _generate(
    cfg: GenerateCommandConfig,
    model: BaseModel,
    engine: Engine,
    prompts: list[list[int]],
    selector: Selector | None,
    notes: Console,
    other: Run | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Generate, show the texts and the report; an interruption still reports what there is.

    Args:
        other: a run that has read these prompts, which are not read again.
    """
    write = write_text if cfg.stream else None
    run, is_interrupted = decode(engine, model.tokenizer, prompts, cfg.generation, notes, write, other=other)
    results, report = run.results(), run.report()
    if cfg.stream:
        write_text("\n")
    elif not cfg.json and (is_interrupted or not cfg.compare):
        for number, result in enumerate(results):
            heading = f"--- prompt {number}\n" if len(results) > 1 else ""
            write_text(f"{heading}{result.text}\n")
    notes.rule("sparse" if selector else "dense")
    for line in describe(report, selector, cfg.generation, model.cfg):
        notes.print(line, markup=False, soft_wrap=True)
    if is_interrupted:
        raise KeyboardInterrupt
    return run, {
        "results": [dataclasses.asdict(result) for result in results],
        "prefill_tokens_per_second": report.prefill_rate,
        "decode_tokens_per_second": report.decode_rate,
        "compile_seconds": report.compile_seconds,
        "reads": dataclasses.asdict(report.reads),
    }


def _side_by_side(result: dict[str, Any]) -> Table:
    """Return a table of both texts and both speeds."""
    table = Table(show_lines=True)
    rates = {name: result[name]["decode_tokens_per_second"] for name in ("dense", "sparse")}
    for name in ("dense", "sparse"):
        times = f" ({rates['sparse'] / rates['dense']:.2f} x)" if name == "sparse" else ""
        table.add_column(f"{name}: {rates[name]:.1f} tokens/s{times}", ratio=1, overflow="fold")
    for dense, sparse in zip(result["dense"]["results"], result["sparse"]["results"], strict=True):
        table.add_row(Text(dense["text"]), Text(sparse["text"]))  # as they are: text is no markup
    return table
