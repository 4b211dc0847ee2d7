"""Train the hash functions of every layer of a frozen LLaMA or Qwen model.

One forward pass of the model per window of text feeds the ranking losses of all layers; only the hash functions learn.
The run folder holds config.yaml, env.json, metrics.jsonl, summary.json, curves.png, layers.png, checkpoints/ and
selector/, which is what generation and evaluation load.

    python -m train.layerwise --preset demo                  two CPU cores, about 5 minutes
    python -m train.layerwise --model MODEL --out runs/mine  a GPU
    python -m train.layerwise --resume --out runs/mine       continue after an interruption, bit for bit

The last line on stdout is the summary as JSON.
"""

import itertools
import sys
from collections.abc import Sequence

from spotlight_jax import cli
from spotlight_jax.runs import stored_by
from train.config import PRESETS, LayerwiseConfig

main = cli.main_of("train.loop")


def command(args: Sequence[str] | None = None) -> int:
    """Run from flags: `python -m train.layerwise` or `spotlight train`."""
    given = list(sys.argv[1:] if args is None else args)
    return cli.run(main, LayerwiseConfig, "train.layerwise", __doc__ or "", given, _start)


def _start(args: Sequence[str]) -> LayerwiseConfig:
    """What the flags start from: the run that is resumed, or the preset."""
    return stored_by(LayerwiseConfig)(args) or PRESETS[_preset_of(args)]


def _preset_of(args: Sequence[str]) -> str:
    """The preset that the other flags start from; a wrong name is left to the parser to refuse."""
    name = "default"
    for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or following
    return name if name in PRESETS else "default"


if __name__ == "__main__":
    sys.exit(command())
