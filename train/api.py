"""Training from Python: hash functions for a model, fitted to text or trained on it.

For example:

    from spotlight_jax import fit, generate, load_model

    selector = fit("notes/*.txt")  # a minute or two on two CPU cores
    print(generate(load_model("smollm2-135m"), [open("book.txt").read()], selector=selector)[0].text)
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.display import Display
from spotlight_jax.models.source import lasting_name
from spotlight_jax.selector.checkpoint import Selector, load_selector
from train import loop
from train.config import PRESETS, LayerwiseConfig
from train.data import open_inputs
from train.estimate import check_memory
from train.trainer import correct_tails, first_state, hash_functions, make_selector

Text = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def fit(text: Text, cfg: LayerwiseConfig = PRESETS["demo"]) -> Selector:
    """Fit hash functions of every layer of a model to text, in closed form, and correct its tail: nothing is trained.

    The frozen model runs over `cfg.fit_windows` windows of `cfg.data.window` tokens, and the moments of its keys and
    queries give the hash functions (`selector.fitting`). Nothing is written: `save_selector` does that.

    Args:
        text: files, folders, globs, hub data sets (`hf:NAME`) or `embedded`, one or several; see `DataConfig.train`.
        cfg: the model and everything else, as a training run has it; what is about steps is not used.

    Returns: the selector, ready for `generate`; `info["recipe"]` holds `cfg`.

    Raises: InputError where text or model cannot be used, or the device has too little memory.
    """
    use_compile_cache()
    cfg = dataclasses.replace(_on_text(text, cfg), model=lasting_name(cfg.model), resume=False, dry_run=False)
    with Display() as display:
        plan = loop.announce(cfg, display)
        check_memory(plan)
        inputs = open_inputs(plan, display)
        state = first_state(inputs, display)
        sets = [hash_functions(plan, state, length) for length in plan.lengths]
        if cfg.tail.windows:
            sets = correct_tails(inputs, sets, 0, display).sets
    return make_selector(plan, sets)


def train(text: Text, out: str | os.PathLike[str], cfg: LayerwiseConfig = PRESETS["demo"]) -> Selector:
    """Train hash functions of every layer of a model on text, as `spotlight train` does.

    Progress goes to stderr, a table of held-out quality to stdout. Ctrl-C saves a checkpoint and ends the program; the
    same call with `cfg.resume` goes on from there, bit for bit.

    Args:
        text: files, folders, globs, hub data sets (`hf:NAME`) or `embedded`, one or several; see `DataConfig.train`.
        out: the run's folder, which is made: config, metrics, pictures, checkpoints and `selector/`.
        cfg: the model and everything else; by default the preset `demo`, made for two CPU cores. On a GPU give
            `train.config.PRESETS["default"]`, or `dataclasses.replace` of either.

    Returns: the selector; `info["metrics"]` holds its measured quality.

    Raises: InputError where text, model or folder cannot be used, or the device has too little memory.
    """
    loop.train(dataclasses.replace(_on_text(text, cfg), out=os.fspath(out)))
    return load_selector(Path(out))


def _on_text(text: Text, cfg: LayerwiseConfig) -> LayerwiseConfig:
    """Return the config of the same run on this text."""
    named = [text] if isinstance(text, str | os.PathLike) else text
    train_on = tuple(os.fspath(source) for source in named)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=train_on))
