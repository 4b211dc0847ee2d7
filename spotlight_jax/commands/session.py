"""What generate and chat share: flags, the compilation cache, and a model loaded only after it was seen to fit."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from rich.console import Console

from spotlight_jax.checkpoint import Selector, load_selector
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generate import GenerateConfig, Report, head_shape, make_decode_config, make_engine
from spotlight_jax.memory import GIB, available_bytes, check_memory, plan_memory
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.load import BaseModel, load_model
from spotlight_jax.models.params import default_dtype
from spotlight_jax.sampling import SamplingConfig
from spotlight_jax.selection import SelectionConfig

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """A model, a selector, and how text is continued."""

    model: str = "smollm2-135m"
    """A folder in Hugging Face's layout, a hub id, a .gguf file, or smollm2-135m."""
    selector: Path | None = None
    """What training wrote (a run or its selector folder); without one, every token is read."""
    max_new_tokens: int = 128
    """Most tokens after a prompt."""
    stop: tuple[str, ...] = ()
    """Strings of which the first to appear ends a text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text token."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this much probability."""
    seed: int = 0
    """Of the draws."""
    keep: float = 0.02
    """Share of the cached tokens a query reads."""
    budget: int | None = None
    """A fixed number of tokens instead of a share."""
    min_tokens: int = 20
    """The least that a share gives."""
    sink_tokens: int = 0
    """First tokens that are always read, counted in the budget."""
    recent_tokens: int = 0
    """Newest tokens that are always read, counted in the budget."""
    per: Literal["kv_head", "query_head"] = "kv_head"
    """One selection for all query heads of a KV head, or one per query head."""
    dense_layers: tuple[int, ...] = (0, 1)
    """Layers that read everything."""
    min_context: int | Literal["auto"] = "auto"
    """Sequences shorter than this are read densely; auto: from where sparse steps were measured to be faster."""
    prefill_chunk: int | None = None
    """Prompt tokens per prefill step."""
    block: int = 32
    """Tokens decoded on the device between two looks of the host."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto: bfloat16 on an accelerator, float32 on a CPU."""

    def generation(self) -> GenerateConfig:
        """The settings that generation reads; raises InputError for those that cannot be used."""
        return GenerateConfig(
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            sampling=SamplingConfig(self.temperature, self.top_k, self.top_p, self.seed),
            selection=SelectionConfig(
                keep=self.keep,
                budget=self.budget,
                min_tokens=self.min_tokens,
                sink_tokens=self.sink_tokens,
                recent_tokens=self.recent_tokens,
                per=self.per,
                dense_layers=self.dense_layers,
                min_context=self.min_context,
            ),
            prefill_chunk=self.prefill_chunk,
            block=self.block,
        )

    def weights_dtype(self) -> jnp.dtype:
        """What `auto` means here."""
        return jnp.dtype(default_dtype() if self.dtype == "auto" else self.dtype)


def read_selector(cfg: SessionConfig, model_cfg: DecoderConfig) -> Selector | None:
    """The selector, checked against the model; the model's weights are not needed."""
    if cfg.selector is None:
        return None
    return load_selector(cfg.selector, head_shape(model_cfg))


def load_fitting(
    cfg: SessionConfig,
    model_cfg: DecoderConfig,
    selector: Selector | None,
    prompt_lengths: list[int],
    console: Console,
) -> tuple[BaseModel, Engine]:
    """Plan the memory, say so, and only then load the weights; raises InputError where they cannot fit."""
    generation, dtype = cfg.generation(), cfg.weights_dtype()
    probe = Engine(model_cfg, {"embed": {"table": jnp.zeros((), dtype)}}, None, make_decode_config(generation))
    longest = max(prompt_lengths)
    plan = plan_memory(
        model_cfg,
        dtype,
        len(prompt_lengths),
        probe.capacity(0, longest, cfg.max_new_tokens),
        probe.chunk_length(longest),
        None if selector is None else selector.cfg,
        generation.selection,
    )
    free = available_bytes()
    known = "" if free is None else f" of {free / GIB:.2f} free"
    console.print(f"memory: {plan.describe()}{known}", highlight=False, style="dim")
    check_memory(plan, free)
    model = load_model(cfg.model, dtype)
    return model, make_engine(model, generation, selector)


def read_text(path: Path) -> str:
    """A text file's content; raises InputError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"'{path}': no such file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not a readable UTF-8 text file ({type(error).__name__})") from None


def describe(report: Report, selector: Selector | None, cfg: GenerateConfig, model_cfg: DecoderConfig) -> list[str]:
    """The lines of a report."""
    reads = report.reads
    lines = [
        f"prompt      {report.prompt_tokens} tokens, {report.prefill_rate:,.1f} tokens/s",
        f"decode      {report.new_tokens} tokens, {report.decode_rate:,.1f} tokens/s",
        f"compile     {report.compile_seconds:.1f} s (once; kept for the next start)",
    ]
    if selector is None:
        lines.append(f"read/step   all tokens: K/V {reads.bytes_dense / MIB:,.1f} MiB")
        return lines
    read = reads.bytes_keys_values + reads.bytes_codes
    dense = [layer for layer in cfg.selection.dense_layers if layer < model_cfg.layers]
    budget = f"keep {cfg.selection.keep:g}" if cfg.selection.budget is None else f"budget {cfg.selection.budget}"
    lines.append(
        f"read/step   {reads.tokens} tokens per head ({budget}): K/V {reads.bytes_keys_values / MIB:,.1f} MiB + codes "
        f"{reads.bytes_codes / MIB:,.1f} MiB = {read / max(reads.bytes_dense, 1):.1%} of dense "
        f"{reads.bytes_dense / MIB:,.1f} MiB"
    )
    lines.append(f"dense       layers {', '.join(map(str, dense)) or 'none'} of {model_cfg.layers}")
    return lines
