"""The whole path on the embedded model: train hash functions, then generate from a long prompt, dense and sparse.

    make demo                       two idle CPU cores: six minutes, and downloads

The prompt is a passage, thousands of tokens of another book, and the opening of the passage again: to go on, the model
has to read the passage far back in its cache.

The last lines on stdout are a sentence about the far end of the context, and the training summary as JSON, with what
was generated under `demo`.
"""

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from spotlight_jax import cli, runs, texts
from spotlight_jax.commands import generate
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.display import print_result
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.token_ids import encode_text
from train.config import PRESETS, LayerwiseConfig

_PASSAGE, _OPENING = 400, 60  # tokens of the passage, and of its opening at the end of the prompt


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train on the embedded corpus, then generate."""

    out: str | None = None
    """Run folder; without it, a new one under runs/."""
    steps: int = PRESETS["demo"].steps
    """Optimiser steps."""
    prompt_tokens: int = 4000
    """Length of the prompt."""
    new_tokens: int = 64
    """Tokens to generate."""
    keep: float = 0.02
    """Share of the cached tokens a sparse step reads."""

    def __post_init__(self) -> None:
        """Refuse, before anything is trained, what training or generating would refuse."""
        check_numbers(self)
        _ = self.training, self.generation
        least = _PASSAGE + _OPENING + 1
        if self.prompt_tokens < least:
            raise InputError(f"prompt_tokens is {self.prompt_tokens}; the passage and its opening take {least}")

    @property
    def training(self) -> LayerwiseConfig:
        """The training run."""
        return dataclasses.replace(PRESETS["demo"], out=self.out, steps=self.steps)

    @property
    def generation(self) -> GenerateConfig:
        """How the prompt is continued."""
        return GenerateConfig(max_new_tokens=self.new_tokens, selection=SelectionConfig(keep=self.keep))


def main(cfg: DemoConfig) -> dict[str, Any]:
    """Train, generate twice, and print what both came to."""
    from train import loop, report  # not at the top: `--help` waits for no JAX

    out = cfg.out or str(runs.next_free(pathlib.Path("runs"), "demo"))
    summary = loop.train(dataclasses.replace(cfg.training, out=out))
    prompt, expected = _long_prompt(PRESETS["demo"].model, cfg)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "prompt.txt"
        file.write_text(prompt, encoding="utf-8")
        compared = generate.main(
            generate.GenerateCommandConfig(
                selector=pathlib.Path(out),
                prompt_file=(file,),
                generation=cfg.generation,
                compare=True,
            )
        )
    print(f"The passage {cfg.prompt_tokens - _OPENING:,} tokens back goes on: {expected!r}")
    if far := report.describe_far(summary):
        print(far)
    summary["demo"] = {
        name: {
            "text": compared[name]["results"][0]["text"],
            "tokens_per_second": round(compared[name]["decode_tokens_per_second"], 2),
            "tokens_read": compared[name]["reads"]["tokens"],
        }
        for name in ("dense", "sparse")
    }
    print_result(summary)
    return summary


def _long_prompt(model: str, cfg: DemoConfig) -> tuple[str, str]:
    """Return a passage, other text and the passage's opening again; and how the passage goes on."""
    from spotlight_jax.models.load import load_config, open_tokenizer

    tokenizer, vocab = open_tokenizer(model), load_config(model).vocab

    def tokens_of(name: str, count: int) -> list[int]:
        text = "\n".join(texts.read_text(name))
        middle = text.index("\n\n", len(text) // 2)  # past front matter and contents
        return encode_text(tokenizer, text[middle : middle + 8 * count].strip(), vocab)[:count]

    passage = tokens_of("sherlock", _PASSAGE)
    between = tokens_of("alice", cfg.prompt_tokens - _PASSAGE - _OPENING)
    prompt = tokenizer.decode([*passage, *between, *passage[:_OPENING]])
    # a list only for a batch
    return str(prompt), str(tokenizer.decode(passage[_OPENING : _OPENING + cfg.new_tokens]))


def command(args: Sequence[str] | None = None) -> int:
    """Run `python -m train.demo` or `spotlight demo`."""
    return cli.run(main, DemoConfig, "spotlight demo", __doc__ or "", args)


if __name__ == "__main__":
    sys.exit(command())
