"""Serve a model to many clients at once, over OpenAI's API.

    spotlight serve --selector runs/demo

Then http://127.0.0.1:8000 shows a chat, and clients of OpenAI's API use http://127.0.0.1:8000/v1. SIGTERM and Ctrl-C
let running requests end first. Needs the extra: pip install 'spotlight-jax[serve]'. docs/serve.md has all of it.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from spotlight_jax import cli, runs
from spotlight_jax.config.mesh import describe_mesh, parse_mesh
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError, check_numbers


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What is served, and how much of it at once."""

    model: str | None = None
    """Folder in Hugging Face's layout, hub id or .gguf file; None: the selector's own, or else smollm2-135m."""
    selector: Path | None = None
    """What training wrote (a run or its selector folder), or hf:OWNER/NAME[@REVISION] of the hub; without one, every
    token is read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto: bfloat16 on an accelerator, float32 on a CPU."""
    mesh: tuple[str, ...] = ()
    """Devices to spread over, by axis: model=2 (heads and widths), data=2 model=4 (slots too), context=4 (tokens of
    each sequence); without it, as few devices as hold the model and the slots."""
    name: str | None = None
    """What clients call the model; None: the model's own name."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every network, which wants an API key."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    api_key: str | None = None
    """What clients must give as their key; None: the environment's SPOTLIGHT_API_KEY, or else nothing."""
    context: int = 8192
    """Most tokens of a request, prompt and answer; the model's context where that is less."""
    slots: int = 8
    """Requests decoded at once; the others wait."""
    queue: int = 64
    """Most requests that wait; more are refused with 429."""
    prefix_tokens: int | None = None
    """Tokens of prompts' beginnings that are kept for requests that begin alike; None: twice the context, and none on
    meshes with data or context, which cannot keep any; 0: none."""
    prefill_chunk: int | None = None
    """Prompt tokens prefilled between two blocks; None: 128 on a CPU, 1024 elsewhere."""
    block: int | None = None
    """Tokens decoded between two looks at who comes and goes; None: 4 on a CPU, 8 elsewhere."""
    seconds: float = 600.0
    """A request that takes longer ends with an error."""
    drain: float = 30.0
    """Seconds that running requests have to end after SIGTERM."""
    max_body: int = 8 * 2**20
    """Most bytes of a request's body."""
    body_seconds: float = 30.0
    """Seconds that a body may take to arrive."""
    warm_up: bool = True
    """Compile every program before the first request; they are kept for the next start."""
    log_prompts: bool = False
    """Write token ids of prompts to the log; without it, logs hold no prompts."""
    tail: bool = True
    """Estimate the attention to tokens that are not read, where the selector was trained for that."""
    selection: OmitArgPrefixes[SelectionConfig] = dataclasses.field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        """Refuse what serves nobody."""
        check_numbers(self)
        given = runs.differences(self.selection, SelectionConfig())
        if self.selector is None and given:
            raise InputError(f"without a selector every token is read, whatever {given[0]} says; give --selector")
        least = {
            "context": 2,
            "slots": 1,
            "queue": 0,
            "prefill_chunk": 1,
            "block": 1,
            "max_body": 1,
            "prefix_tokens": 0,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {value}; give at least {smallest}")
        for name in ("seconds", "drain", "body_seconds"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more seconds")
        self._check_mesh()
        if not 0 <= self.port <= 65535:
            raise InputError(f"port is {self.port}; give one from 0 to 65535")
        if self.api_key == "":
            raise InputError("api_key is empty; give one, or leave the flag out")

    def _check_mesh(self) -> None:
        """Refuse slots that a mesh does not divide, and pages that it would split."""
        sizes = parse_mesh(self.mesh)
        groups = sizes.get("data", 1)
        if self.slots % groups:
            more = -(-self.slots // groups) * groups
            raise InputError(f"--mesh data={groups} does not divide {self.slots} slots; give --slots {more}")
        if not keeps_pages(sizes) and self.prefix_tokens:
            raise InputError(
                f"--mesh {describe_mesh(sizes)} keeps no beginnings of prompts, which lie whole on a device; leave "
                "--prefix-tokens out, or give a mesh of model alone"
            )


def keeps_pages(sizes: dict[str, int]) -> bool:
    """Whether each device of a mesh has all pages of prompts, of its own heads: it copies them by itself."""
    return sizes.get("data", 1) == sizes.get("context", 1) == 1


EXTRA = ("prometheus_client", "pydantic", "starlette", "uvicorn")


def main(cfg: ServeConfig) -> None:
    """Serve until a signal ends it; raises InputError where a package of the extra is missing."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise InputError(f"serving needs {' and '.join(missing)}; run pip install 'spotlight-jax[serve]'")
    importlib.import_module("spotlight_jax.serve.run").main(cfg)


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight serve`."""
    return cli.run(main, ServeConfig, "spotlight serve", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
