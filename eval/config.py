"""The flags that every evaluation of methods has, and what they open."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers

from eval.flags import EvalConfig, ReadingConfig
from eval.methods import UNBUDGETED, base_name
from eval.methods.base import Method
from eval.methods.opening import open_method, selector_of
from spotlight_jax import runs
from spotlight_jax.config.selection import SelectionConfig, check_layers
from spotlight_jax.errors import InputError
from spotlight_jax.generate import head_shape
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import Params
from spotlight_jax.models.load import load_config, load_weights, open_tokenizer
from spotlight_jax.models.params import resolve_dtype
from spotlight_jax.models.presets import RANDOM
from spotlight_jax.selector.checkpoint import Selector, check_shape, choose_model, describe_range, load_selector

Evaluation = TypeVar("Evaluation", bound=EvalConfig)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One method with one budget: what a row of results is about."""

    method: str
    keep: float | None  # None: it has no budget
    setting: str  # what it always reads
    selection: SelectionConfig

    @property
    def part(self) -> dict[str, Any]:
        """The fields that name it in a row."""
        return {"method": self.method, "keep": self.keep, "setting": self.setting}


def list_trials(cfg: EvalConfig) -> list[Trial]:
    """Every method with every share and setting; once those that have no budget."""
    trials = []
    for name in cfg.methods:
        if name in UNBUDGETED:
            keep = 1.0 if name == "dense" else None
            trials.append(Trial(name, keep, UNBUDGETED[name], cfg.selection.at(cfg.keep[0])))
            continue
        for reading in cfg.readings:
            setting = describe_setting(reading)
            trials += [Trial(name, keep, setting, reading.at(keep)) for keep in cfg.keep]
    return trials


def describe_keep(keep: float | None) -> str:
    """How a table calls a share or a number of tokens."""
    return "-" if keep is None else f"{keep:g}"


def describe_part(row: dict[str, Any], names: Mapping[str, str]) -> list[str]:
    """How a table's first columns call the trial that a row is about: method, share, what is always read.

    Args:
        names: of `eval.labels.name_methods`.
    """
    return [names[row["method"]], describe_keep(row["keep"]), row["setting"]]


def describe_reading(row: Mapping[str, Any]) -> str:
    """The second line of a method's panel in a picture: what it was asked to read; "" where it reads everything."""
    if row["keep"] == 1:
        return ""
    return f"\n{row['setting']}" if row["keep"] is None else f"\nkeep {row['keep']:g}, {row['setting']}"


def describe_setting(reading: ReadingConfig) -> str:
    """How a table calls what is always read."""
    if reading.sink_tokens == reading.recent_tokens == 0:
        return "bare"
    return f"sinks {reading.sink_tokens} + recent {reading.recent_tokens}"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, what reads its texts, and its selector."""

    cfg: DecoderConfig
    params: Params
    tokenizer: transformers.PreTrainedTokenizerBase | None  # None: a random model, whose texts are token ids
    selector: Selector | None  # of --selector
    source: str
    # all selectors that were opened, by their folders
    selectors: Mapping[str, Selector] = dataclasses.field(default_factory=dict)

    def reading(self, name: str) -> tuple["Subject", str]:
        """Itself with the selector that a method reads by, and that method's name without the selector's folder."""
        opened = self.selectors.get(name.partition("@")[2])
        selector = opened or selector_of(name, self.selector, head_shape(self.cfg))
        return dataclasses.replace(self, selector=selector), base_name(name)

    def open_method(self, name: str, selection: SelectionConfig, seed: int = 0) -> Method:
        """A method for this model; see `eval.methods.open_method`. Raises InputError for one that never chooses."""
        reader, base = self.reading(name)
        method = open_method(base, reader.selector, selection, head_shape(self.cfg), seed)
        if name != "dense" and set(range(self.cfg.layers)) <= set(method.dense_layers):
            raise InputError(f"method '{name}' reads all {self.cfg.layers} layers of this model densely; leave it out")
        return method


def name_model(cfg: Evaluation) -> Evaluation:
    """The config with the model's name filled in, where it was left to the selectors.

    Raises: InputError where a selector cannot be read, or where selectors belong to different models.
    """
    return dataclasses.replace(cfg, model=choose_model(cfg.model, _open_selectors(cfg))[0])


def _open_selectors(cfg: EvalConfig) -> dict[str, Selector]:
    """All selectors of an evaluation by their folders: --selector's, and those that methods name."""
    named = [name.partition("@")[2] for name in cfg.methods if "@" in name]
    return {folder: load_selector(folder) for folder in (cfg.selector, *named) if folder is not None}


def say_ranges(subject: Subject, length: int) -> None:
    """On stderr, a line for each selector that was fitted to fewer positions than sequences of `length` tokens have."""
    for folder, selector in subject.selectors.items():
        if remark := describe_range(selector, length):
            print(f"'{folder}': {remark}", file=sys.stderr, flush=True)


def load_subject(cfg: EvalConfig) -> Subject:
    """Weights, tokenizer and selectors; a selector that was trained for another model is named on stderr.

    What loading and measuring, which take long, would fail at is looked at first: where the results go, and whether
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
    model_cfg, params = load_weights(model, resolve_dtype(cfg.dtype))
    tokenizer = None if model.startswith(RANDOM) else open_tokenizer(model)
    return Subject(model_cfg, params, tokenizer, selectors.get(cfg.selector or ""), model, selectors)
