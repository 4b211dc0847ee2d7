"""The cases of an evaluation, each method with each budget, and how tables and pictures name them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eval.common.flags import EvalConfig, SelectionFlags
from eval.methods import UNBUDGETED
from spotlight_jax.config.selection import SelectionConfig


@dataclasses.dataclass(frozen=True)
class EvalCase:
    """One method with one budget: what a row of results is about."""

    method: str
    keep: float | None  # None: it has no budget
    setting: str  # what it always reads
    selection: SelectionConfig

    @property
    def part(self) -> dict[str, Any]:
        """Return the fields that name it in a row."""
        return {"method": self.method, "keep": self.keep, "setting": self.setting}


def list_cases(cfg: EvalConfig) -> list[EvalCase]:
    """List every method with every share and setting, once those that have no budget."""
    cases = []
    for name in cfg.methods:
        if name in UNBUDGETED:
            keep = 1.0 if name == "dense" else None
            cases.append(EvalCase(name, keep, UNBUDGETED[name], cfg.selection.at(cfg.keep[0])))
            continue
        for flags in cfg.selections:
            setting = describe_setting(flags)
            cases += [EvalCase(name, keep, setting, flags.at(keep)) for keep in cfg.keep]
    return cases


def describe_keep(keep: float | None) -> str:
    """Return how a table names a share or a number of tokens."""
    return "-" if keep is None else f"{keep:g}"


def describe_part(row: dict[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the first columns of a table for the case that a row is about: method, share, what is always read.

    Args:
        names: of the methods, see `eval.common.labels.name_methods`.
    """
    return [names[row["method"]], describe_keep(row["keep"]), row["setting"]]


def describe_selection(row: Mapping[str, Any]) -> str:
    """Return the second line of a method's panel in a picture, its budget; "" where it reads everything."""
    if row["keep"] == 1:
        return ""
    return f"\n{row['setting']}" if row["keep"] is None else f"\nkeep {row['keep']:g}, {row['setting']}"


def describe_setting(flags: SelectionFlags) -> str:
    """Return how a table names the tokens that are always read."""
    if flags.sink_tokens == flags.recent_tokens == 0:
        return "bare"
    return f"sinks {flags.sink_tokens} + recent {flags.recent_tokens}"
