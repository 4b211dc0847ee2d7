"""Speed by length and batch: one layer's operations compared with dense attention, and decoding of a whole model.

    python -m eval.speed                                     # two CPU cores, SmolLM2's shape: about 10 minutes
    python -m eval.speed --parts ops --lengths 32768 131072 524288 --batches 1 8      # one GPU, Qwen2.5-7B's shape
    python -m eval.speed --parts model --model-lengths 32768 131072 --model-batches 1 4 6 24
    python -m eval.speed --parts model --model-lengths 32768 --model-batches 24 --profile    # and a step by kernel
    python -m eval.speed --parts kernels       # every op of spotlight_jax/kernels by implementation, at its shapes

Everything runs on random data, never zeros, and every operation's output is compared with a plain NumPy version
before it is timed. Operations run in a compiled loop whose steps wait for each other; the time of the same loop around
nothing is taken off. Medians over rounds, each round one call of everything. The floor is the bytes that an operation
has to move over the bandwidth of rewriting a large array, measured in the same run; short caches can be faster, since
they stay in the device's caches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from spotlight_jax import cli
from spotlight_jax.config.mesh import parse_mesh
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError, check_numbers
from spotlight_jax.models.config import nearest
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.runs import stored_by

Kind = Literal["ops", "model", "kernels"]


# flags that matter to one part alone
FLAGS_OF = {
    "ops": ("lengths", "batches", "ops", "caches"),
    "model": ("model_lengths", "model_batches", "dense_layers", "tail", "profile", "mesh"),
}


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is timed. Without lengths, batches or a preset: Qwen2.5-7B's on an accelerator, SmolLM2's on a CPU."""

    parts: tuple[Kind, ...] = ("ops", "model")
    """One layer's operations, decoding with a whole model, or (kernels) the ops beneath by implementation, at the
    shapes of real models that they are checked at, whatever the preset and lengths."""
    preset: str | None = None
    """Shape of the model, with random weights."""
    lengths: tuple[int, ...] = ()
    """Cached tokens that operations are timed at."""
    batches: tuple[int, ...] = (1,)
    """Sequences that operations are timed with, every length with every batch."""
    model_lengths: tuple[int, ...] = ()
    """Cached tokens of each sequence that whole models are timed at, those that are decoded included."""
    model_batches: tuple[int, ...] = ()
    """Sequences that whole models decode together, every length with every batch that fits."""
    ops: tuple[str, ...] = ()
    """Operations to time, by the names in the table; without it, all."""
    keep: float = 0.02
    """Share of the tokens that a query reads."""
    code_bits: int = 128
    """Bits of a token's code."""
    dense_layers: tuple[int, ...] = SelectionConfig().dense_layers
    """Layers of whole models that sparse decoding reads densely; none with nothing after the flag."""
    rounds: int = 9
    """Rounds, everything once in each; medians are reported."""
    caches: int = 8
    """Most caches that a loop's step walks over, so that none stays in the device's caches; fewer compile sooner."""
    new_tokens: int = 16
    """Decoding steps of a whole model per round."""
    tail: bool = False
    """Time sparse decoding with an estimate of what is not read, too."""
    profile: bool = False
    """Trace one round more of whole models, and show what each kernel of a step took."""
    mesh: tuple[str, ...] = ()
    """Devices to spread whole models over, such as model=2; without it, one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Floats of weights, keys and values; auto: bfloat16 on an accelerator, float32 on a CPU."""
    out: str | None = None
    """Run folder; without it, a new one under runs/."""
    resume: bool = False
    """Continue the run in --out: what it has timed is not timed again."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        check_numbers(self)
        parse_mesh(self.mesh)  # refuses what is none
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"there is no preset {self.preset!r}{nearest(self.preset, tuple(PRESETS))}")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise InputError("give --parts some of ops, model and kernels, each once")
        counts = (*self.lengths, *self.batches, *self.model_lengths, *self.model_batches, self.rounds, self.new_tokens)
        if min(*counts, self.caches) < 1 or not self.batches:
            raise InputError("lengths, batches, rounds, caches and new_tokens must be at least 1")
        for part, names in FLAGS_OF.items():
            given = [name for name in names if getattr(self, name) != getattr(SpeedConfig, name)]
            if part not in self.parts and given:
                flag = "--" + given[0].replace("_", "-")
                raise InputError(f"{flag} is about part '{part}', which is not timed; add it to --parts")
        if self.resume and self.out is None:
            raise InputError("--resume needs the run's folder: add --out RUN_FOLDER")
        SelectionConfig(keep=self.keep)

    @property
    def free_fields(self) -> tuple[str, ...]:
        """List the fields that a resumed run may change: its rows name them."""
        return ("out", "resume", "parts", "lengths", "batches", "model_lengths", "model_batches")


main = cli.main_of("eval.speed.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval speed`."""
    return cli.run(main, SpeedConfig, "spotlight eval speed", __doc__, args, stored_by(SpeedConfig))
