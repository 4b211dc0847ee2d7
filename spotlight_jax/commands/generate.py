"""Continue a prompt, reading only the tokens that matter.

    spotlight generate --selector runs/demo --prompt-file book.txt --stream

Prints the text, then what it took: tokens per second of prompt and decoding, compile time apart, and what a step read
beside what a dense step reads. `--compare` generates densely too, and shows both side by side. Seconds for a short
prompt; on two CPU cores a prompt of 7,500 tokens takes SmolLM2 about a minute.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spotlight_jax import cli
from spotlight_jax.checkpoint import Selector
from spotlight_jax.commands.session import (
    SessionConfig,
    describe,
    load_fitting,
    read_selector,
    read_text,
)
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generate import STREAM_BLOCK, GenerateConfig, Run, encode_chat, encode_prompts, make_engine
from spotlight_jax.models.load import BaseModel, load_config, open_tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateCommandConfig(SessionConfig):
    """What to continue, and how to show it."""

    prompt: tuple[str, ...] = ()
    """Texts to continue; several are decoded together."""
    prompt_file: tuple[Path, ...] = ()
    """UTF-8 files to continue, after the texts."""
    prompt_tokens: int | None = None
    """Use only the first tokens of each prompt."""
    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message."""
    stream: bool = False
    """Show the text as it comes (one prompt)."""
    compare: bool = False
    """Generate densely as well and show both side by side; needs a selector."""
    json: bool = False
    """End with one line of JSON: texts, token ids and the report."""


def main(cfg: GenerateCommandConfig) -> dict:
    """Run the command; returns what `--json` prints."""
    console, notes = Console(highlight=False), Console(stderr=True)
    if cfg.compare and cfg.selector is None:
        raise InputError("--compare sets a selector beside dense reading; give --selector")
    generation = cfg.generation()
    use_compile_cache()
    model_cfg = load_config(cfg.model)
    prompts = _read_prompts(cfg, open_tokenizer(cfg.model))
    prompts = encode_prompts(None, prompts, cfg.max_new_tokens, model_cfg)
    if cfg.stream and len(prompts) > 1:
        raise InputError(f"--stream shows one text; {len(prompts)} prompts were given")
    selector = read_selector(cfg, model_cfg)
    model, engine = load_fitting(cfg, model_cfg, selector, [len(prompt) for prompt in prompts], notes)
    result = _generate(model, engine, prompts, generation, selector, cfg.stream, console)
    if cfg.compare:
        dense = make_engine(model, generation)
        result = {"sparse": result, "dense": _generate(model, dense, prompts, generation, None, False, console)}
        console.print(_side_by_side(result))
    if cfg.json:
        print(json.dumps({"command": "generate", "model": cfg.model, **result}))
    return result


def _read_prompts(cfg: GenerateCommandConfig, tokenizer) -> list[list[int]]:
    """Token ids of every prompt."""
    if cfg.prompt_tokens is not None and cfg.prompt_tokens < 1:
        raise InputError(f"prompt_tokens is {cfg.prompt_tokens}; give at least 1")
    texts = [*cfg.prompt, *(read_text(path) for path in cfg.prompt_file)]
    if not texts:
        raise InputError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    if cfg.chat:
        encoded = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    else:
        encoded = [list(tokenizer(text, verbose=False).input_ids) for text in texts]
    return [tokens[: cfg.prompt_tokens] for tokens in encoded]


def _generate(
    model: BaseModel,
    engine: Engine,
    prompts: list[list[int]],
    generation: GenerateConfig,
    selector: Selector | None,
    is_streaming: bool,
    console: Console,
) -> dict:
    """Generate, show the texts and the report; an interruption still reports what there is."""
    run = Run(engine, model.tokenizer, prompts, generation)
    try:
        if is_streaming:
            _write(run.pieces[0])
        while not run.is_done:
            pieces = run.step(STREAM_BLOCK if is_streaming else None)
            if is_streaming:
                _write(pieces[0])
    except KeyboardInterrupt:
        _finish(run, is_streaming, console, selector, generation, model)
        raise
    return _finish(run, is_streaming, console, selector, generation, model)


def _write(piece: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _finish(
    run: Run,
    is_streaming: bool,
    console: Console,
    selector: Selector | None,
    generation: GenerateConfig,
    model: BaseModel,
) -> dict:
    """Show what was not streamed, and the report."""
    results, report = run.results(), run.report()
    if is_streaming:
        _write("\n")
    else:
        for number, result in enumerate(results):
            if len(results) > 1:
                console.rule(f"prompt {number}")
            console.print(result.text, markup=False)
    console.rule("sparse" if selector else "dense")
    for line in describe(report, selector, generation, model.cfg):
        console.print(line, markup=False)
    return {
        "results": [dataclasses.asdict(result) for result in results],
        "prefill_tokens_per_second": report.prefill_rate,
        "decode_tokens_per_second": report.decode_rate,
        "compile_seconds": report.compile_seconds,
        "reads": dataclasses.asdict(report.reads),
    }


def _side_by_side(result: dict) -> Table:
    """Both texts and both speeds."""
    table = Table(show_lines=True)
    rates = {name: result[name]["decode_tokens_per_second"] for name in ("dense", "sparse")}
    for name in ("dense", "sparse"):
        times = f" ({rates['sparse'] / rates['dense']:.2f} x)" if name == "sparse" else ""
        table.add_column(f"{name}: {rates[name]:.1f} tokens/s{times}", ratio=1, overflow="fold")
    for dense, sparse in zip(result["dense"]["results"], result["sparse"]["results"], strict=True):
        table.add_row(dense["text"], sparse["text"])
    return table


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight generate`."""
    return cli.run(main, GenerateCommandConfig, "spotlight generate", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
