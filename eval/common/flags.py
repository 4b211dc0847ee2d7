"""Flags that every evaluation of methods has."""

import dataclasses
from typing import Literal

from eval.methods import OF_SELECTOR, check_names
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import DENSE_LAYERS, LONGEST, MIN_TOKENS, SelectionConfig
from spotlight_jax.errors import InputError, check_numbers

# what a resumed run may change, because each of its parts names it, or none depends on it
FREE_FIELDS = ("out", "resume", "methods", "keep", "settings", "mesh")


@dataclasses.dataclass(frozen=True)
class SelectionFlags:
    """Which tokens are selected; --keep says how many."""

    min_tokens: int = MIN_TOKENS
    """Least number of tokens that a share gives."""
    sink_tokens: int = 0
    """First tokens of a sequence that are always read; counted in the budget."""
    recent_tokens: int = 0
    """Newest tokens that are always read, the query's included; counted in the budget."""
    per: Literal["kv_head", "query_head"] = "kv_head"
    """One selection for all query heads that share a KV head, or one per query head."""
    dense_layers: tuple[int, ...] = DENSE_LAYERS
    """Layers that read everything; for quest and magicpig, those they were published with."""

    def __post_init__(self) -> None:
        """Refuse what no array holds; what else selects nothing is refused by `at`."""
        check_numbers(self)

    def at(self, keep: float) -> SelectionConfig:
        """Return the selection of a share of the tokens, or of a fixed number where `keep` is above 1."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if keep > 1:
            if keep != int(min(keep, LONGEST)):
                raise InputError(f"keep is {keep:g}; above 1 it is a number of tokens: whole, and at most {LONGEST}")
            del fields["min_tokens"]  # of shares alone
            return SelectionConfig(budget=int(keep), min_context=0, **fields)
        return SelectionConfig(keep=keep, min_context=0, **fields)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated."""

    model: str | None = None
    """A folder in Hugging Face's layout, a hub id, a .gguf file, smollm2-135m, or random:SHAPE (random weights); None:
    the model that the selector was trained for, or else smollm2-135m."""
    selector: str | None = None
    """Trained hash functions: a selector folder, the run folder that holds it, or hf:OWNER/NAME[@REVISION] of the
    hub."""
    methods: tuple[str, ...] = ("dense", "oracle-scores", "spotlight", "spotlight+tail", "window")
    """Methods to evaluate: dense, oracle-scores, oracle-mass, oracle-query, spotlight (spotlight@FOLDER: another
    selector), lsh (lsh-centred, lsh-gaussian, lsh-gaussian-centred), quest, magicpig, window, random, binary;
    NAME+tail: with an estimate of what is not read; MODULE:FUNCTION: one of your own (examples/add_method.py)."""
    keep: tuple[float, ...] = (0.02,)
    """Shares of a sequence's tokens that a query reads; a number above 1 is that many tokens."""
    settings: tuple[Literal["bare", "sinks"], ...] = ()
    """Run each method without sinks and recent tokens (bare), with 4 and 64 of them (sinks), or both; without this
    flag, with those of --selection."""
    selection: SelectionFlags = SelectionFlags()
    out: str | None = None
    """Run folder; without it, a new one under runs/."""
    resume: bool = False
    """Continue the run in --out: what it has measured is not measured again."""
    seed: int = 0
    """Random seed of the methods that draw."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floats of the model; auto: bfloat16 on an accelerator, float32 on a CPU."""
    mesh: tuple[str, ...] = ()
    """Devices to spread the model over, such as model=2 (heads and widths); without it, one."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        check_numbers(self)
        check_names(self.methods)
        parse_mesh(self.mesh)  # refuses what is none
        if not self.keep or len(set(self.keep)) < len(self.keep):
            raise InputError("give --keep at least one share, each once")
        if self.settings and (self.selection.sink_tokens, self.selection.recent_tokens) != (0, 0):
            raise InputError("--settings and --selection both choose the tokens that are always read; give one of them")
        for flags in self.selections:
            for keep in self.keep:
                flags.at(keep)  # refuses what selects nothing
        if len(set(self.settings)) < len(self.settings):
            raise InputError("give each of --settings once")
        if self.resume and self.out is None:
            raise InputError("--resume needs the run's folder: add --out RUN_FOLDER")
        if set(OF_SELECTOR) & set(self.methods) and self.selector is None:
            raise InputError("method 'spotlight' needs trained hash functions; add --selector FOLDER")

    @property
    def free_fields(self) -> tuple[str, ...]:
        """List the fields that a resumed run may change: its rows name them, and no row depends on them."""
        return FREE_FIELDS

    @property
    def selections(self) -> tuple[SelectionFlags, ...]:
        """Return the selections that each method is run with."""
        pairs = {"bare": (0, 0), "sinks": (4, 64)}
        found = [
            dataclasses.replace(self.selection, sink_tokens=pairs[name][0], recent_tokens=pairs[name][1])
            for name in self.settings
        ]
        return tuple(found) or (self.selection,)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How whole sequences are evaluated."""

    whole_length: bool = False
    """Give every query the budget of the whole sequence (the paper's rule), instead of that of the tokens before it."""
    dense_prefix: int = 0
    """Number of first positions at which queries read everything."""
    scores_mib: int | None = None
    """Memory for the scores that are held at once, MiB; by default 32 on a CPU and 256 on a GPU."""

    def __post_init__(self) -> None:
        """Refuse prefixes and memory of less than nothing."""
        check_numbers(self)
        if self.dense_prefix < 0:
            raise InputError(f"dense_prefix is {self.dense_prefix}; give 0 or more tokens")
        if self.scores_mib is not None and self.scores_mib < 1:
            raise InputError(f"scores_mib is {self.scores_mib}; give at least 1")
