"""Prefill and decoding on the device: a prompt in chunks, then blocks of tokens that need nothing of the host."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from jaxtyping import Array, PyTree

from spotlight_jax.cache import Cache, LayerCache, bucket_length, empty_layer, grow
from spotlight_jax.compiled import compile_with
from spotlight_jax.config.generation import DecodeConfig, RowConfig
from spotlight_jax.decode_step import (
    DecodeState,
    LayerSelectors,
    Mode,
    code_layer,
    decode_block,
    first_token,
    free_rows,
    insert_row,
    layer_selectors,
    padded_stops,
    prefill_layer,
)
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.sharding import build, mesh_of, place, shardings_of
from spotlight_jax.models.split_k import FEW_ROWS
from spotlight_jax.sampling import TokenLogprobs, batch_sampling, check_chosen
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, check_shape
from spotlight_jax.selector.selection import sparse_from

SMALLEST_CHUNK = 16
CHUNK = {"cpu": 512}  # tokens prefilled at once: more use the device better, and take more workspace
GPU_CHUNK = 2048
# A step's products with the same input become one, however large their weights (XLA stops at 64 MiB): it reads them
# as they lie, in one launch. Not for many sequences: there XLA may take a library's product, and copy weights for it.
MERGED_PRODUCTS = {"xla_gpu_dot_merger_threshold_mb": 1 << 14}

# a program's name, its mode, and what its arguments are: their tree, and the shape and dtype of each leaf
ProgramKey = tuple[str, str, PyTreeDef, tuple[tuple[tuple[int, ...], Any], ...]]


def _lies_at(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return getattr(leaf, "sharding", None) == sharding


class Engine:
    """A model and its selector on the device, with the programs compiled for them so far.

    Where the weights lie on a mesh (`models.sharding`), so do selector and caches, and every program runs there.
    Compiling is timed apart from running, so that tokens per second are of running alone.
    """

    def __init__(self, model_cfg: DecoderConfig, params: PyTree, selector: Selector | None, cfg: DecodeConfig):
        """Hold references; nothing is compiled yet.

        Args:
            model_cfg: of the model.
            params: the model's weights, on one device or on a mesh.
            selector: says which tokens are read; None: every token is.
            cfg: what programs are compiled for.

        Raises: InputError for another model's selector.
        """
        if selector is not None:
            shape = HeadShape(model_cfg.layers, model_cfg.q_heads, model_cfg.kv_heads, model_cfg.head_dim)
            check_shape(selector.shape, shape, f"the selector (trained for {selector.base_model})")
        self.model_cfg, self.params, self.cfg = model_cfg, params, cfg
        self.selector = selector
        self.mesh = mesh_of(params)
        self._sets = place(layer_selectors(selector, model_cfg.layers, cfg.selection, cfg.tail), self.mesh)
        self._stacked: LayerSelectors | None = None  # all sets behind each other, once a batch uses several
        self.dtype = params["embed"]["table"].dtype
        self.compile_seconds = 0.0
        self._programs: dict[ProgramKey, Any] = {}

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        donate: tuple[int, ...],
        options: dict[str, Any] | None = None,
        **static: Any,
    ) -> Any:
        """Run `function(*args, **static)` by its program for these shapes, compiled on first use.

        Args:
            name: of the program, for `programs`.
            function: pure; arguments that are arrays first.
            args: arrays and trees of them.
            donate: arguments whose buffers the program may overwrite: the caller gives them up.
            options: XLA's, for this program.
            **static: what is no array; another value is another program.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (name, str(static.get("mode")), structure, shapes)
        if key not in self._programs:
            start = time.perf_counter()

            found: dict[str, Any] = {}

            # compiled over flat arguments: JAX describes a tree's leaves by objects that are no arrays
            def flat(*leaves: Array) -> list[Array]:
                results = function(*jax.tree.unflatten(structure, leaves), **static)
                if self.mesh is not None:
                    found["out_shardings"] = shardings_of(results, self.mesh)
                found["structure"] = jax.tree.structure(results)
                return jax.tree.leaves(results)

            ends = np.cumsum([0] + [len(jax.tree.leaves(arg)) for arg in args])
            donated = [leaf for arg in donate for leaf in range(ends[arg], ends[arg + 1])]
            placed: dict[str, Any] = {}
            if self.mesh is not None:
                jax.eval_shape(flat, *leaves)
                placed = {"in_shardings": tuple(shardings_of(args, self.mesh)), "out_shardings": found["out_shardings"]}
            lowered = jax.jit(flat, donate_argnums=donated, **placed).lower(*leaves)
            program = compile_with(lowered, options)
            self._programs[key] = program, found["structure"], placed.get("in_shardings")
            self.compile_seconds += time.perf_counter() - start
        program, results, shardings = self._programs[key]
        if shardings is not None:
            pairs = zip(leaves, shardings, strict=True)
            leaves = [leaf if _lies_at(leaf, there) else jax.device_put(leaf, there) for leaf, there in pairs]
        return jax.tree.unflatten(results, program(*leaves))

    @property
    def programs(self) -> dict[ProgramKey, Any]:
        """Compiled programs by name and shapes, for what they say about memory."""
        return {key: program for key, (program, *_) in self._programs.items()}

    @property
    def has_tail(self) -> bool:
        """Whether sparse steps estimate the attention to tokens that they do not read."""
        return any(own is not None and own.functions.tail is not None for own in self._sets[0])

    def chunk_length(self, tokens: int) -> int:
        """Return the tokens of a prefill step for a prompt of `tokens`: a short one is not padded to a whole chunk."""
        most = self.cfg.prefill_chunk or CHUNK.get(jax.default_backend(), GPU_CHUNK)
        return min(most, max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length()))

    def capacity(self, cached: int, tokens: int, max_new_tokens: int) -> int:
        """Return the slots of a cache with `cached` tokens that gets a prompt of `tokens` and `max_new_tokens` more."""
        chunk = self.chunk_length(tokens)
        return bucket_length(cached + max(-(-tokens // chunk) * chunk, tokens + max_new_tokens))

    def empty_cache(self, batch: int, max_len: int) -> Cache:
        """Return an unfilled cache; layers that are always dense keep no codes."""
        lengths, code_sets = (jnp.zeros((batch,), jnp.int32) for _ in range(2))  # two buffers: both are given up
        layers = build(lambda: self.empty_layers(batch, max_len), self.mesh)
        return Cache(layers=layers, lengths=lengths, code_sets=code_sets)

    def empty_layers(self, batch: int, max_len: int) -> tuple[LayerCache, ...]:
        """Return all layers of `empty_cache`, on the default device."""
        cfg, layers = self.model_cfg, []
        for selector in self._sets[0]:
            code_shape = None
            if selector is not None:
                code_shape = selector.functions.cfg.code_shape(cfg.q_heads, cfg.kv_heads)
            has_moments = selector is not None and selector.functions.tail is not None
            layers.append(empty_layer(batch, max_len, cfg.kv_heads, cfg.head_dim, self.dtype, code_shape, has_moments))
        return tuple(layers)

    def selectors(self, sets: np.ndarray) -> LayerSelectors:
        """Return all layers' hash functions for sequences that use these sets of the selector, one for each sequence.

        Where all use the same one, whichever it is, the same compiled programs serve them.
        """
        used = tuple(sets.tolist())
        if len(set(used)) == 1:
            return self._sets[used[0]]
        if self._stacked is None:
            self._stacked = place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *self._sets), self.mesh)
        rows = jnp.asarray(used, jnp.int32)
        return tuple(one and dataclasses.replace(one, sets=rows) for one in self._stacked)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        cache: Cache | None = None,
        progress: Callable[[int, int], None] | None = None,
        rows: Sequence[RowConfig] | None = None,
    ) -> DecodeState:
        """Cache the prompts (after what `cache` holds, which is given up) and choose each one's first token.

        Raises InputError where the model's logits are not finite, as `decode` does.

        Args:
            prompts: token ids.
            max_new_tokens: of all sequences, or of each.
            cache: of an earlier state, with as many sequences.
            progress: gets the tokens of the longest prompt done so far, and all of them; the host then waits for each
                chunk.
            rows: how each sequence goes on; None: the most probable token, and no token ends one.
        """
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        if counts.size == 0 or counts.min() < 1:
            raise InputError("a prompt is empty; give at least one token")
        longest, new = int(counts.max()), np.broadcast_to(np.asarray(max_new_tokens, np.int32), counts.shape)
        rows = [RowConfig()] * len(prompts) if rows is None else rows
        cached = 0 if cache is None else int(cache.lengths.max())
        max_len = self.capacity(cached, longest, int(new.max()))
        cache = self.empty_cache(len(prompts), max_len) if cache is None else grow(cache, max_len)
        chunk = self.chunk_length(longest)
        padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        layers, base, held_sets, last = list(cache.layers), cache.lengths, cache.code_sets, None
        rope_len = base + jnp.asarray(counts + new)
        selectors, code_sets = self._open_codes(layers, np.asarray(base), np.asarray(rope_len), np.asarray(held_sets))
        for start in range(0, padded.shape[1], chunk):
            tokens = padded[:, start : start + chunk]
            x, layers = self.prefill_chunk(
                tokens, layers, selectors, base + start, rope_len, base + jnp.asarray(counts)
            )
            places = np.clip(counts - 1 - start, 0, chunk - 1)
            is_here = (counts > start) & (counts <= start + chunk)
            picked = x[jnp.arange(len(prompts)), jnp.asarray(places)]
            last = picked if last is None else jnp.where(jnp.asarray(is_here)[:, None], picked, last)
            if progress is not None:
                last.block_until_ready()
                progress(min(start + chunk, longest), longest)
        state = DecodeState(
            cache=Cache(layers=tuple(layers), lengths=base + jnp.asarray(counts), code_sets=jnp.asarray(code_sets)),
            tokens=jnp.zeros((len(prompts),), jnp.int32),
            is_done=jnp.zeros((len(prompts),), bool),
            left=jnp.asarray(new),
            chosen=jnp.zeros((len(prompts),), jnp.int32),
            rope_len=rope_len,
            sampling=batch_sampling([row.sampling for row in rows], [row.number for row in rows]),
            stop_tokens=jnp.asarray([padded_stops(row) for row in rows], jnp.int32),
        )
        args = (self.params, last, state)
        state, _ = self.run("first_token", first_token, args, (2,), model_cfg=self.model_cfg)
        check_chosen(np.asarray(state.tokens))
        return state

    def _open_codes(
        self, layers: list[LayerCache], cached: np.ndarray, ends: np.ndarray, held: np.ndarray
    ) -> tuple[LayerSelectors, np.ndarray]:
        """Hash functions for sequences by their lengths at their ends, and which sets those are, `int32[batch]`.

        Codes in `layers` that are of another set (a conversation that has grown) are made anew from the cached keys.
        """
        if self.selector is None:
            return self._sets[0], held
        wanted = np.array([self.selector.set_of(int(end)) for end in ends], np.int32)
        selectors = self.selectors(wanted)
        if (wanted != held)[cached > 0].any():
            for index, selector in enumerate(selectors):
                if selector is not None:
                    layers[index] = self.run("code", code_layer, (layers[index], selector), (0,))
        return selectors, wanted

    def prefill_chunk(
        self,
        tokens: np.ndarray,
        layers: list[LayerCache],
        selectors: LayerSelectors,
        starts: Array,
        rope_len: Array,
        ends: Array,
    ) -> tuple[Array, list[LayerCache]]:
        """Pass one chunk through all layers: one program serves all layers of a kind."""
        x = jnp.take(self.params["embed"]["table"], jnp.asarray(tokens), axis=0)
        filled = []
        for index, (layer, selector) in enumerate(zip(layers, selectors, strict=True)):
            args = (self.params[f"layer_{index}"], x, layer, selector, starts, rope_len, ends)
            static: dict[str, Any] = {"cfg": self.model_cfg, "implementation": self.cfg.attention, "mesh": self.mesh}
            x, layer = self.run("prefill", prefill_layer, args, (1, 2), **static)
            filled.append(layer)
        return x, filled

    def empty_state(self, slots: int, max_len: int) -> DecodeState:
        """Return a batch of free slots, each for up to `max_len` tokens: `prefill`, `insert`, `decode`, `free`."""
        none = [RowConfig()] * slots
        zeros: dict[str, Any] = {
            name: jnp.zeros((slots,), jnp.int32) for name in ("tokens", "left", "chosen", "rope_len")
        }
        return DecodeState(
            cache=self.empty_cache(slots, bucket_length(max_len)),
            **zeros,
            is_done=jnp.ones((slots,), bool),
            sampling=batch_sampling([row.sampling for row in none], [0] * slots),
            stop_tokens=jnp.asarray([padded_stops(row) for row in none], jnp.int32),
        )

    def insert(self, state: DecodeState, slot: int, other: DecodeState, row: int = 0) -> DecodeState:
        """Return a batch with one sequence of another, which goes on as it would have alone; `state` is given up.

        Args:
            state: the batch.
            slot: of the batch; what it held is overwritten.
            other: holds the sequence, such as what `prefill` gave; it is kept.
            row: of the sequence in it.

        Raises: InputError where the sequence's cache is longer than the batch's.
        """
        if other.cache.max_len > state.cache.max_len:
            raise InputError(
                f"a cache of {other.cache.max_len} slots does not fit a batch of {state.cache.max_len}; "
                "make the batch for longer sequences"
            )
        return self.run("insert", insert_row, (state, other, np.int32(slot), np.int32(row)), (0,))

    def free(self, state: DecodeState, slots: Sequence[int]) -> DecodeState:
        """Return a batch in which these slots are free; `state` is given up."""
        is_free = np.isin(np.arange(len(state.tokens)), slots)
        return self.run("free", free_rows, (state, jnp.asarray(is_free)), (0,))

    def mode_of(self, lengths: np.ndarray, is_done: np.ndarray, starts: np.ndarray | None = None) -> tuple[Mode, int]:
        """Return how the next block reads, and for how many steps that stays right.

        Args:
            lengths: tokens each sequence has cached; the next step's own token comes on top.
            is_done: sequences that have ended, which no block looks at.
            starts: the length from which each sequence is read sparsely; None: what the selection says.
        """
        if all(selector is None for selector in self._sets[0]) or is_done.all():
            return "dense", self.cfg.block
        if starts is None:
            starts = np.full(len(lengths), sparse_from(self.cfg.selection, len(lengths), jax.default_backend()))
        below = (starts - (lengths + 1))[~is_done]  # steps until each running sequence is long enough
        if (below <= 0).all():
            return "sparse", self.cfg.block
        steps = min(int(below[below > 0].min()), self.cfg.block)
        return ("mixed" if (below <= 0).any() else "dense"), steps

    def decode(self, state: DecodeState, limit: int | None = None) -> tuple[DecodeState, np.ndarray]:
        """Decode one block of at most `limit` steps; the given state is given up.

        Returns: the new state and the tokens chosen, [batch, steps]; fewer steps where the way of reading changes.
        """
        starts = None if state.reads is None else np.asarray(state.reads.sparse_from)
        mode, steps = self.mode_of(np.asarray(state.cache.lengths), np.asarray(state.is_done), starts)
        state, tokens, _ = self.decode_block(state, mode, min(steps, limit or steps))
        check_chosen(tokens)
        return state, tokens

    def decode_block(
        self, state: DecodeState, mode: Mode, steps: int
    ) -> tuple[DecodeState, np.ndarray, TokenLogprobs | None]:
        """Decode one block of at most `steps` steps in a given mode; see `decode`, and `mode_of` for what is right.

        A sequence whose logits are not finite is done with the token `NOT_FINITE`; the others go on.

        Returns:
            The new state, the tokens chosen, [batch, steps], and their log-probabilities where the state asks for some,
                [batch, block], still on the device.
        """
        selectors = self.selectors(np.asarray(state.cache.code_sets))
        args = (self.params, selectors, state, np.int32(steps))
        static = {"model_cfg": self.model_cfg, "cfg": self.cfg, "mode": mode, "mesh": self.mesh}
        is_merged = jax.default_backend() == "gpu" and state.tokens.shape[0] <= FEW_ROWS
        options = MERGED_PRODUCTS if is_merged else None
        state, (tokens, logprobs), taken = self.run("decode", decode_block, args, (2,), options, **static)
        # fetched at once, with what the next call looks at: an array keeps what was fetched of it
        cache = state.cache
        tokens, taken, *_ = jax.device_get((tokens, taken, cache.lengths, cache.code_sets, state.is_done))
        return state, tokens[:, :taken], logprobs
