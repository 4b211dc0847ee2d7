"""What the flags of an evaluation open: a model with its tokenizer and selectors, and methods for it."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import transformers

from eval.common.flags import EvalConfig
from eval.methods import base_name
from eval.methods.base import Method
from eval.methods.opening import open_method, selector_of
from spotlight_jax import runs
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import SelectionConfig, check_layers
from spotlight_jax.errors import InputError
from spotlight_jax.generation import head_shape
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.load import load_config, load_weights, open_tokenizer
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.presets import RANDOM
from spotlight_jax.models.sharding import open_mesh, weights_on
from spotlight_jax.selector.checkpoint import Selector, check_shape, choose_model, describe_range, load_selector

Evaluation = TypeVar("Evaluation", bound=EvalConfig)


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model with its tokenizer and selectors, each opened once."""

    cfg: DecoderConfig
    params: Params
    tokenizer: transformers.PreTrainedTokenizerBase | None  # None: a random model; its texts are token ids
    selector: Selector | None  # of --selector
    source: str
    # all selectors that were opened, by their folders
    selectors: Mapping[str, Selector] = dataclasses.field(default_factory=dict)

    def for_method(self, name: str) -> tuple["EvalModel", str]:
        """Return the model with the selector that a method reads by, and the method's name without its folder."""
        opened = self.selectors.get(name.partition("@")[2])
        selector = opened or selector_of(name, self.selector, head_shape(self.cfg))
        return dataclasses.replace(self, selector=selector), base_name(name)

    def open_method(self, name: str, selection: SelectionConfig, seed: int = 0) -> Method:
        """Open a method for this model; raises InputError for one that reads every layer densely."""
        model, base = self.for_method(name)
        method = open_method(base, model.selector, selection, head_shape(self.cfg), seed)
        if name != "dense" and set(range(self.cfg.layers)) <= set(method.dense_layers):
            raise InputError(f"method '{name}' reads all {self.cfg.layers} layers of this model densely; leave it out")
        return method


def name_model(cfg: Evaluation) -> Evaluation:
    """Return the config with the model's name filled in, where it was left to the selectors.

    Raises: InputError where a selector cannot be read, or where selectors belong to different models.
    """
    return dataclasses.replace(cfg, model=choose_model(cfg.model, _open_selectors(cfg))[0])


def _open_selectors(cfg: EvalConfig) -> dict[str, Selector]:
    """Load all selectors of an evaluation, by their folders: --selector's, and those that methods name."""
    named = [name.partition("@")[2] for name in cfg.methods if "@" in name]
    return {folder: load_selector(folder) for folder in (cfg.selector, *named) if folder is not None}


def warn_of_ranges(model: EvalModel, length: int) -> None:
    """Print a line for each selector that was fitted to fewer positions than sequences of `length` tokens have."""
    for folder, selector in model.selectors.items():
        if remark := describe_range(selector, length):
            print(f"'{folder}': {remark}", file=sys.stderr, flush=True)


def load_eval_model(cfg: EvalConfig) -> EvalModel:
    """Load weights, tokenizer and selectors; a selector that was trained for another model is named on stderr.

    What loading and measuring, which take long, would fail at is checked first: where the results go, and whether
    the selectors fit the model.

    Raises: InputError where one is missing or does not fit the others.
    """
    runs.check_destination(cfg.out, cfg.resume)
    if cfg.out is not None and cfg.resume:
        runs.RunFolder(Path(cfg.out)).check_resumed(cfg, cfg.free_fields)
    selectors = _open_selectors(cfg)
    model, remarks = choose_model(cfg.model, selectors)
    for remark in remarks:
        print(remark, file=sys.stderr, flush=True)
    model_cfg = load_config(model)
    check_layers(cfg.selection.dense_layers, model_cfg.layers)
    for folder, selector in selectors.items():
        what = f"selector '{folder}' (trained for {selector.base_model})"
        check_shape(selector.shape, head_shape(model_cfg), what)
    placement = weights_on(open_mesh(parse_mesh(cfg.mesh), model_cfg))
    model_cfg, params = load_weights(model, resolve_dtype(cfg.dtype), placement)
    tokenizer = None if model.startswith(RANDOM) else open_tokenizer(model)
    return EvalModel(model_cfg, params, tokenizer, selectors.get(cfg.selector or ""), model, selectors)
