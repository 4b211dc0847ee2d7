"""Prefill and decoding on the device: a prompt in chunks, then blocks of tokens without a word to the host.

Sequences of a batch are filled from slot 0 on, so positions are those of each sequence alone; what a shorter prompt
leaves behind it is never read and later overwritten.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from spotlight_jax import hashing
from spotlight_jax.cache import Cache, LayerCache, bucket_length, empty_layer, grow
from spotlight_jax.cached_attention import LayerSelector, attend_chunk, attend_densely, attend_sparsely
from spotlight_jax.checkpoint import Selector, check_shape
from spotlight_jax.compiled import compile_with
from spotlight_jax.config.generation import AttentionImpl, DecodeConfig
from spotlight_jax.config.selection import SelectionConfig, check_layers
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import apply_layer, embed_tokens, unembed
from spotlight_jax.models.split_k import FEW_ROWS
from spotlight_jax.sampling import NOT_FINITE, check_chosen, sample
from spotlight_jax.selection import sparse_from

Mode = Literal["dense", "sparse", "mixed"]  # what the sparse layers do in a block: by length, sequences may differ

SMALLEST_CHUNK = 16
CHUNK = {"cpu": 512}  # tokens prefilled at once: more use the device better, and take more workspace
GPU_CHUNK = 2048
# A step's products with the same input become one, however large their weights (XLA stops at 64 MiB): it reads them
# as they lie, in one launch. Not for many sequences: there XLA may take a library's product, and copy weights for it.
MERGED_PRODUCTS = {"xla_gpu_dot_merger_threshold_mb": 1 << 14}


@flax.struct.dataclass
class DecodeState:
    """Where each sequence of a batch stands between two blocks."""

    cache: Cache
    tokens: Int32[Array, "batch"]  # chosen last, not cached yet
    is_done: Bool[Array, "batch"]
    left: Int32[Array, "batch"]  # tokens that may still be chosen
    chosen: Int32[Array, "batch"]  # tokens chosen since the prompt: the draw's number
    rope_len: Int32[Array, "batch"]  # length that `dynamic` RoPE adapts to; the same for prompt and steps


def layer_selectors(selector: Selector | None, layers: int, cfg: SelectionConfig) -> tuple[LayerSelector | None, ...]:
    """Each layer's hash function; None for layers that are always read densely."""
    check_layers(cfg.dense_layers, layers)
    if selector is None:
        return (None,) * layers
    return tuple(
        None if layer in cfg.dense_layers else LayerSelector(hashing.layer_params(selector.params, layer), selector.cfg)
        for layer in range(layers)
    )


def prefill_layer(
    layer_params: PyTree,
    x: Float[Array, "batch q_len embed"],
    layer: LayerCache,
    selector: LayerSelector | None,
    starts: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    cfg: DecoderConfig,
    implementation: AttentionImpl,
) -> tuple[Float[Array, "batch q_len embed"], LayerCache]:
    """One layer over one chunk of the prompt."""
    positions = starts[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]

    def attend(queries, keys, values):
        return attend_chunk(queries, keys, values, layer, starts, selector, implementation)

    return apply_layer(layer_params, x, positions, attend, cfg, rope_len)


def rows_of_step(batch: int) -> int:
    """Rows of a step's products with weights.

    One more than a single sequence has: XLA for GPUs makes sums of products with one row. It does not merge them, and
    computes them anew, weights and all, where it fuses them with what follows.
    """
    return 2 if batch == 1 and jax.default_backend() == "gpu" else batch


def decode_step(
    params: PyTree,
    selectors: tuple[LayerSelector | None, ...],
    cache: Cache,
    tokens: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Logits after one more token of each sequence, and the cache with it; lengths are left to the caller."""
    lengths, batch = cache.lengths, tokens.shape[0]
    rows = rows_of_step(batch)

    def fill(array: Array) -> Array:
        return jnp.broadcast_to(array, (rows, *array.shape[1:]))

    shortest = sparse_from(cfg.selection, batch, jax.default_backend())
    is_sparse = (lengths + 1 >= shortest)[:, None, None, None]

    def attend_with(layer: LayerCache, selector: LayerSelector | None) -> Callable:
        def attend(queries, keys, values):
            if selector is None or mode == "dense":
                return attend_densely(queries, keys, values, layer, lengths, selector, cfg.attention)
            sparse, appended = attend_sparsely(queries, keys, values, layer, lengths, selector, cfg.selection)
            if mode == "sparse":
                return sparse, appended
            dense, appended = attend_densely(queries, keys, values, appended, lengths, None, cfg.attention)
            return jnp.where(is_sparse, sparse, dense), appended

        def attend_filled(*new):
            out, appended = attend(*(heads[:batch] for heads in new))
            return fill(out), appended

        return attend_filled

    x = embed_tokens(params, fill(tokens)[:, None], model_cfg)
    positions, rope_lens = fill(lengths)[:, None], fill(rope_len)
    layers = []
    for index, (layer, selector) in enumerate(zip(cache.layers, selectors, strict=True)):
        attend = attend_with(layer, selector)
        x, appended = apply_layer(params[f"layer_{index}"], x, positions, attend, model_cfg, rope_lens)
        layers.append(appended)
    return unembed(params, x, model_cfg)[:batch, 0], Cache(layers=tuple(layers), lengths=lengths)


def _choose(logits: Float[Array, "batch vocab"], state: DecodeState, cfg: DecodeConfig) -> DecodeState:
    """Draw each sequence's next token, and see who is done."""
    base = jax.random.key(cfg.sampling.seed)
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(lambda row, draw: jax.random.fold_in(jax.random.fold_in(base, row), draw))(rows, state.chosen)
    tokens = jnp.where(state.is_done, state.tokens, sample(logits, keys, cfg.sampling))
    running = (~state.is_done).astype(jnp.int32)
    left = state.left - running
    is_stop = jnp.any(tokens[:, None] == jnp.asarray(cfg.stop_tokens, jnp.int32)[None, :], axis=1)
    is_done = state.is_done | is_stop | (left <= 0) | (tokens == NOT_FINITE)
    return dataclasses.replace(state, tokens=tokens, left=left, chosen=state.chosen + running, is_done=is_done)


def first_token(
    params: PyTree, x: Float[Array, "batch embed"], state: DecodeState, model_cfg: DecoderConfig, cfg: DecodeConfig
) -> DecodeState:
    """The first token after the prompt, from the stream of the prompt's last one."""
    return _choose(unembed(params, x[:, None], model_cfg)[:, 0], state, cfg)


def decode_block(
    params: PyTree,
    selectors: tuple[LayerSelector | None, ...],
    state: DecodeState,
    limit: Int32[Array, ""],
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
) -> tuple[DecodeState, Int32[Array, "batch block"], Int32[Array, ""]]:
    """Up to `limit` (at most cfg.block) steps, fewer where every sequence is done before.

    Returns: the state, the tokens chosen (a sequence that is done repeats its last), and how many steps were taken.
    """
    batch = state.tokens.shape[0]

    def is_running(carry):
        step, state, _ = carry
        return (step < limit) & ~jnp.all(state.is_done)

    def take_step(carry):
        step, state, out = carry
        logits, cache = decode_step(params, selectors, state.cache, state.tokens, state.rope_len, model_cfg, cfg, mode)
        # a sequence that is done writes to the same unfilled slot again and again, and stays as long as it was
        cache = cache.replace(lengths=cache.lengths + (~state.is_done).astype(jnp.int32))
        state = _choose(logits, state.replace(cache=cache), cfg)
        return step + 1, state, lax.dynamic_update_slice_in_dim(out, state.tokens[:, None], step, axis=1)

    out = jnp.zeros((batch, cfg.block), jnp.int32)
    steps, state, out = lax.while_loop(is_running, take_step, (jnp.int32(0), state, out))
    return state, out, steps


class Engine:
    """A model and its selector on the device, with the programs compiled for them so far.

    Compiling is timed apart from running, so that tokens per second are of running alone.
    """

    def __init__(self, model_cfg: DecoderConfig, params: PyTree, selector: Selector | None, cfg: DecodeConfig):
        """Hold references; nothing is copied or compiled yet. Raises InputError for another model's selector."""
        if selector is not None:
            shape = hashing.HeadShape(model_cfg.layers, model_cfg.q_heads, model_cfg.kv_heads, model_cfg.head_dim)
            check_shape(selector.shape, shape, f"the selector (trained for {selector.base_model})")
        self.model_cfg, self.params, self.cfg = model_cfg, params, cfg
        self.selector = selector
        self.selectors = layer_selectors(selector, model_cfg.layers, cfg.selection)
        self.dtype = params["embed"]["table"].dtype
        self.compile_seconds = 0.0
        self._programs: dict[tuple, Any] = {}

    def run(
        self,
        name: str,
        function: Callable,
        args: tuple,
        donate: tuple[int, ...],
        options: dict[str, Any] | None = None,
        **static: Any,
    ) -> Any:
        """`function(*args, **static)` by its program for these shapes, compiled on first use.

        Args:
            donate: arguments whose buffers the program may overwrite: the caller gives them up.
            options: XLA's, for this program.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (name, str(static.get("mode")), structure, shapes)
        if key not in self._programs:
            start = time.perf_counter()

            # compiled over flat arguments: JAX describes a tree's leaves by objects that are no arrays
            def flat(*leaves):
                return function(*jax.tree.unflatten(structure, leaves), **static)

            ends = np.cumsum([0] + [len(jax.tree.leaves(arg)) for arg in args])
            donated = [leaf for arg in donate for leaf in range(ends[arg], ends[arg + 1])]
            lowered = jax.jit(flat, donate_argnums=donated).lower(*leaves)
            self._programs[key] = compile_with(lowered, options)
            self.compile_seconds += time.perf_counter() - start
        return self._programs[key](*leaves)

    @property
    def programs(self) -> dict[tuple, Any]:
        """Compiled programs by name and shapes, for what they say about memory."""
        return dict(self._programs)

    def chunk_length(self, tokens: int) -> int:
        """Tokens of a prefill step for a prompt of `tokens`: short prompts are not padded to a whole chunk."""
        most = self.cfg.prefill_chunk or CHUNK.get(jax.default_backend(), GPU_CHUNK)
        return min(most, max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length()))

    def capacity(self, cached: int, tokens: int, max_new_tokens: int) -> int:
        """Slots for a cache that holds `cached` tokens and gets a prompt of `tokens` and `max_new_tokens` more."""
        chunk = self.chunk_length(tokens)
        return bucket_length(cached + max(-(-tokens // chunk) * chunk, tokens + max_new_tokens))

    def empty_cache(self, batch: int, max_len: int) -> Cache:
        """An unfilled cache; layers that are always dense keep no codes."""
        cfg = self.model_cfg
        layers = []
        for selector in self.selectors:
            code_shape = None
            if selector is not None:
                code_heads = cfg.kv_heads if selector.cfg.code_heads == "kv" else cfg.q_heads
                code_shape = (code_heads, selector.cfg.words)
            layers.append(empty_layer(batch, max_len, cfg.kv_heads, cfg.head_dim, self.dtype, code_shape))
        return Cache(layers=tuple(layers), lengths=jnp.zeros((batch,), jnp.int32))

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        cache: Cache | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeState:
        """Cache the prompts (after what `cache` holds, which is given up) and choose each one's first token.

        Raises InputError where the model's logits are not finite, as `decode` does.

        Args:
            progress: gets the tokens of the longest prompt done so far, and all of them; the host then waits for each
                chunk.
        """
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        if counts.size == 0 or counts.min() < 1:
            raise InputError("a prompt is empty; give at least one token")
        longest = int(counts.max())
        cached = 0 if cache is None else int(cache.lengths.max())
        max_len = self.capacity(cached, longest, max_new_tokens)
        cache = self.empty_cache(len(prompts), max_len) if cache is None else grow(cache, max_len)
        chunk = self.chunk_length(longest)
        padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        layers, base, last = list(cache.layers), cache.lengths, None
        rope_len = base + jnp.asarray(counts + max_new_tokens)
        for start in range(0, padded.shape[1], chunk):
            x, layers = self._prefill_chunk(padded[:, start : start + chunk], layers, base + start, rope_len)
            rows = np.clip(counts - 1 - start, 0, chunk - 1)
            is_here = (counts > start) & (counts <= start + chunk)
            picked = x[jnp.arange(len(prompts)), jnp.asarray(rows)]
            last = picked if last is None else jnp.where(jnp.asarray(is_here)[:, None], picked, last)
            if progress is not None:
                last.block_until_ready()
                progress(min(start + chunk, longest), longest)
        state = DecodeState(
            cache=Cache(layers=tuple(layers), lengths=base + jnp.asarray(counts)),
            tokens=jnp.zeros((len(prompts),), jnp.int32),
            is_done=jnp.zeros((len(prompts),), bool),
            left=jnp.full((len(prompts),), max_new_tokens, jnp.int32),
            chosen=jnp.zeros((len(prompts),), jnp.int32),
            rope_len=rope_len,
        )
        args = (self.params, last, state)
        state = self.run("first_token", first_token, args, (2,), model_cfg=self.model_cfg, cfg=self.cfg)
        check_chosen(np.asarray(state.tokens))
        return state

    def _prefill_chunk(
        self, tokens: np.ndarray, layers: list[LayerCache], starts: Array, rope_len: Array
    ) -> tuple[Array, list[LayerCache]]:
        """One chunk through all layers: one program serves all layers of a kind."""
        x = jnp.take(self.params["embed"]["table"], jnp.asarray(tokens), axis=0)
        filled = []
        for index, (layer, selector) in enumerate(zip(layers, self.selectors, strict=True)):
            args = (self.params[f"layer_{index}"], x, layer, selector, starts, rope_len)
            static: dict[str, Any] = {"cfg": self.model_cfg, "implementation": self.cfg.attention}
            x, layer = self.run("prefill", prefill_layer, args, (1, 2), **static)
            filled.append(layer)
        return x, filled

    def mode_of(self, lengths: np.ndarray, is_done: np.ndarray) -> tuple[Mode, int]:
        """How the next block reads, and for how many steps that stays right.

        Args:
            lengths: tokens each sequence has cached; the next step's own token comes on top.
        """
        if all(selector is None for selector in self.selectors) or is_done.all():
            return "dense", self.cfg.block
        shortest = sparse_from(self.cfg.selection, len(lengths), jax.default_backend())
        below = shortest - (lengths[~is_done] + 1)  # steps until each running sequence is long enough
        if (below <= 0).all():
            return "sparse", self.cfg.block
        steps = min(int(below[below > 0].min()), self.cfg.block)
        return ("mixed" if (below <= 0).any() else "dense"), steps

    def decode(self, state: DecodeState, limit: int | None = None) -> tuple[DecodeState, np.ndarray]:
        """Decode one block of at most `limit` steps; the given state is given up.

        Returns: the new state and the tokens chosen, [batch, steps]; fewer steps where the way of reading changes.
        """
        mode, steps = self.mode_of(np.asarray(state.cache.lengths), np.asarray(state.is_done))
        args = (self.params, self.selectors, state, np.int32(min(steps, limit or steps)))
        static = {"model_cfg": self.model_cfg, "cfg": self.cfg, "mode": mode}
        is_merged = jax.default_backend() == "gpu" and state.tokens.shape[0] <= FEW_ROWS
        options = MERGED_PRODUCTS if is_merged else None
        state, tokens, steps = self.run("decode", decode_block, args, (2,), options, **static)
        # fetched at once, with what the next call looks at: an array keeps what was fetched of it
        tokens, steps, _, _ = jax.device_get((tokens, steps, state.cache.lengths, state.is_done))
        check_chosen(tokens[:, :steps])
        return state, tokens[:, :steps]
