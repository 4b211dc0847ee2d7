"""The flags that generate and chat share."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from spotlight_jax import runs
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError, check_numbers


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """A model, a selector, and how text is continued."""

    model: str | None = None
    """Folder in Hugging Face's layout, hub id or .gguf file; None: the selector's own, or else smollm2-135m."""
    selector: Path | None = None
    """What training wrote (a run or its selector folder), or hf:OWNER/NAME[@REVISION] of the hub; without one, every
    token is read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto: bfloat16 on an accelerator, float32 on a CPU."""
    mesh: tuple[str, ...] = ()
    """Devices to spread over, by axis: model=2 (heads and widths), data=2 model=4 (sequences too), context=4 (tokens of
    each sequence); without it, as few devices as hold the model and the cache."""
    generation: OmitArgPrefixes[GenerateConfig] = dataclasses.field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        """Refuse ways of reading for which there is no selector."""
        check_numbers(self)
        parse_mesh(self.mesh)  # refuses what is none
        given = runs.differences(self.generation.selection, SelectionConfig())
        if self.selector is None and given:
            raise InputError(f"without a selector every token is read, whatever {given[0]} says; give --selector")
