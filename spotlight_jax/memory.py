"""What generation needs and what there is: bytes of weights, cache, codes, workspace, and bytes read per step."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from spotlight_jax.cached_attention import BLOCK
from spotlight_jax.config.hashing import HashConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import param_shapes
from spotlight_jax.moments import BLOCK as MOMENT_BLOCK
from spotlight_jax.moments import kept_bytes, moment_bytes
from spotlight_jax.selector.selection import apply_rule, budget_rule, max_budget

GIB = 2**30
FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a generation holds at once."""

    weights: int
    cache: int
    codes: int  # and moments
    workspace: int  # an estimate of the largest temporaries of prefill and decoding

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.codes + self.workspace

    def describe(self) -> str:
        """Return one line in GiB."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.2f}" for field in dataclasses.fields(self))
        return f"{parts}; together {self.total / GIB:.2f} GiB"


def sparse_layers(cfg: DecoderConfig, selection: SelectionConfig) -> int:
    """Return how many layers read selected tokens."""
    return cfg.layers - sum(layer < cfg.layers for layer in set(selection.dense_layers))


def code_bytes_per_token(cfg: DecoderConfig, hash_cfg: HashConfig) -> int:
    """Return the bytes of one token's codes in one layer."""
    heads, words = hash_cfg.code_shape(cfg.q_heads, cfg.kv_heads)
    return heads * words * 4


def plan_memory(
    cfg: DecoderConfig,
    dtype: jnp.dtype,
    batch: int,
    max_len: int,
    chunk: int,
    hash_cfg: HashConfig | None,
    selection: SelectionConfig,
    has_tail: bool = False,
) -> MemoryPlan:
    """Return what a generation of `batch` sequences with caches of `max_len` slots needs.

    Args:
        dtype: of weights and cache.
        chunk: prompt tokens per prefill step.
        hash_cfg: of the selector; None for dense generation.
        has_tail: whether what is not read is estimated.
    """
    size = jnp.dtype(dtype).itemsize
    weights = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(cfg, dtype))) * size
    cache = 2 * cfg.layers * batch * max_len * cfg.kv_heads * cfg.head_dim * size
    codes = 0
    step = batch * cfg.vocab * FLOAT_BYTES * 2
    if hash_cfg is not None:
        moments = kept_bytes(cfg.kv_heads, cfg.head_dim, dtype) if has_tail else 0
        codes = sparse_layers(cfg, selection) * batch * (max_len * code_bytes_per_token(cfg, hash_cfg) + moments)
        heads = cfg.kv_heads if selection.per == "kv_head" else cfg.q_heads
        rows = batch * heads * max_budget(max_len, selection) * cfg.head_dim
        step += 2 * rows * size + 3 * batch * heads * max_len * FLOAT_BYTES
    else:
        step += 2 * batch * cfg.q_heads * max_len * FLOAT_BYTES
    tokens = batch * chunk
    scores = 2 * batch * cfg.q_heads * chunk * min(BLOCK, max_len) * FLOAT_BYTES
    prefill = tokens * (4 * cfg.embed + 3 * cfg.mlp + 4 * cfg.q_heads * cfg.head_dim) * size + scores
    return MemoryPlan(weights=weights, cache=cache, codes=codes, workspace=max(step, prefill))


def plan_serving(
    cfg: DecoderConfig,
    dtype: jnp.dtype,
    slots: int,
    max_len: int,
    chunk: int,
    pages: int,
    hash_cfg: HashConfig | None,
    selection: SelectionConfig,
    has_tail: bool = False,
) -> MemoryPlan:
    """Return what a server holds: slots, one more sequence that is prefilled, and pages of prompts.

    Args:
        dtype: of weights and cache.
        slots: sequences decoded at once.
        max_len: slots of each one's cache.
        chunk: prompt tokens per prefill step, and of a page.
        pages: chunks of prompts that are kept.
        hash_cfg: of the selector; None for dense reading.
        selection: how many tokens are read.
        has_tail: whether what is not read is estimated.
    """

    def plan(batch: int, length: int, tokens: int) -> MemoryPlan:
        return plan_memory(cfg, dtype, batch, length, tokens, hash_cfg, selection, has_tail)

    # all slots take a step together, and one sequence at a time is prefilled
    parts = plan(slots, max_len, 1), plan(1, max_len, chunk), plan(pages, chunk, 1)
    return MemoryPlan(
        weights=parts[0].weights,
        cache=sum(part.cache for part in parts),
        codes=sum(part.codes for part in parts),
        workspace=max(part.workspace for part in parts),
    )


def available_bytes(device: jax.Device | None = None) -> int | None:
    """Return the bytes of memory that the device has free (a CPU: the machine); None where nobody knows."""
    device = device or jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def check_memory(plan: MemoryPlan, free: int | None, dtype: np.dtype | None = None) -> None:
    """Raise InputError with the numbers where the plan is larger than what is free.

    Args:
        plan: what is needed.
        free: bytes; None where that is not known.
        dtype: of the weights, where a smaller one can be asked for.
    """
    narrower = "--dtype bfloat16, " if dtype is not None and dtype.itemsize > 2 else ""
    if free is not None and plan.total > free:
        raise InputError(
            f"not enough memory: {plan.describe()} are needed and {free / GIB:.2f} GiB are free; "
            f"give {narrower}a shorter prompt, fewer sequences, fewer new tokens or a smaller model"
        )


@dataclasses.dataclass(frozen=True)
class StepReads:
    """Cache traffic of one decoding step; bytes are summed over layers and sequences."""

    tokens: int  # per sequence and KV head (or query head) of a sparse layer, on average over sequences
    bytes_keys_values: int
    bytes_codes: int  # and of moments, where what is not read is estimated
    bytes_dense: int  # keys and values that the same step reads densely


def tokens_read(lengths: np.ndarray, selection: SelectionConfig, has_tail: bool) -> np.ndarray:
    """Return the tokens that a head of a sparse layer reads at most, with so many cached, the new one included.

    Args:
        lengths: `int32[any]`.
        selection: of the step.
        has_tail: the newest tokens, which no moment has yet, are read, too; some of them may be selected.
    """
    budgets = apply_rule(lengths, *budget_rule(selection))
    newest = np.where(lengths > 0, (lengths - 1) % MOMENT_BLOCK + 1, 0) if has_tail else 0
    return np.minimum(budgets + newest, lengths)


def step_reads(
    cfg: DecoderConfig,
    dtype: jnp.dtype,
    lengths: list[int],
    hash_cfg: HashConfig | None,
    selection: SelectionConfig,
    sparse_from: int,
    has_tail: bool = False,
) -> StepReads:
    """Account one step whose sequences have `lengths` tokens, each new token's included."""
    row = 2 * cfg.head_dim * jnp.dtype(dtype).itemsize
    dense = sum(lengths) * cfg.kv_heads * row
    there = np.asarray(lengths, np.int32)
    is_sparse = (there >= sparse_from) & (hash_cfg is not None)
    budgets = np.where(is_sparse, tokens_read(there, selection, has_tail), there).tolist()
    heads = cfg.kv_heads if selection.per == "kv_head" else cfg.q_heads
    sparse_count = sparse_layers(cfg, selection) if hash_cfg is not None else 0
    keys_values, codes = (cfg.layers - sparse_count) * dense, 0
    for length, budget in zip(lengths, budgets, strict=True):
        if hash_cfg is not None and length >= sparse_from:
            keys_values += sparse_count * budget * heads * row
            codes += sparse_count * length * code_bytes_per_token(cfg, hash_cfg)
            codes += sparse_count * moment_bytes(cfg.kv_heads, cfg.head_dim, dtype) * has_tail
        else:
            keys_values += sparse_count * budget * cfg.kv_heads * row
    return StepReads(
        tokens=round(sum(budgets) / len(budgets)),
        bytes_keys_values=keys_values,
        bytes_codes=codes,
        bytes_dense=cfg.layers * dense,
    )
