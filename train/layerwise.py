"""Train the hash functions of every layer of a frozen LLaMA or Qwen model.

One forward pass of the model per window of text feeds the losses of all layers; only the hash functions learn.
The run folder holds config.yaml, env.json, metrics.jsonl, summary.json, curves.png, layers.png, checkpoints/ and
selector/, which is what generation and evaluation load.

    python -m train.layerwise --preset demo                  two CPU cores, about 5 minutes
    python -m train.layerwise --model MODEL --out runs/mine  a GPU
    python -m train.layerwise --resume --out runs/mine       continue after an interruption, bit for bit

The last line on stdout is the summary as JSON.
"""

import itertools
import sys
from collections.abc import Collection, Sequence

from spotlight_jax import cli
from spotlight_jax.config.hashing import FORMS
from spotlight_jax.config.ranking import LOSSES
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import nearest
from spotlight_jax.runs import stored_by
from train.config import PRESETS, LayerwiseConfig, with_recipe

main = cli.main_of("train.loop")


def command(args: Sequence[str] | None = None) -> int:
    """Run from flags: `python -m train.layerwise` or `spotlight train`."""
    given = list(sys.argv[1:] if args is None else args)
    return cli.run(main, LayerwiseConfig, "train.layerwise", __doc__ or "", given, _start)


def _start(args: Sequence[str]) -> LayerwiseConfig:
    """Return what the flags start from: the run that is resumed, or the preset, with the form and loss asked for."""
    base = stored_by(LayerwiseConfig)(args) or PRESETS[_choice(args, "--preset", PRESETS) or "default"]
    form, loss = _choice(args, "--hash.form", FORMS), _choice(args, "--ranking.loss", LOSSES)
    return with_recipe(base, form or base.hash.form, loss or base.ranking.loss) if form or loss else base


def _choice(args: Sequence[str], flag: str, choices: Collection[str]) -> str | None:
    """Return what a flag is given that decides which others there are; raises InputError for what it cannot be."""
    name = None
    for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word == flag or word.startswith(f"{flag}="):
            name = word.partition("=")[2] or following
    if name and name not in choices:
        raise InputError(f"{flag} is '{name}'{nearest(name, list(choices))}")
    return name or None


if __name__ == "__main__":
    sys.exit(command())
