"""A batch that sequences join and leave: each is prefilled chunk by chunk apart from it, then decoded with the others.

A prompt is prefilled in one row of its own, in chunks of fixed sizes at fixed places, so the numbers that a prompt
leaves in the cache depend on nothing but its tokens. Whole chunks are kept as pages, which a later prompt with the same
beginning copies instead of computing them: it gets the very same numbers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from spotlight_jax.cache import LANES, Cache, LayerCache, copy_tokens, cut, resize
from spotlight_jax.config.generation import RowConfig
from spotlight_jax.config.selection import LONGEST, SelectionConfig
from spotlight_jax.decode_step import DecodeState, LayerSelectors, Mode, first_token, insert_row, padded_stops
from spotlight_jax.engine import Engine
from spotlight_jax.layer_by_layer import decode_layer_by_layer
from spotlight_jax.sampling import NOT_FINITE, TokenLogprobs, batch_sampling
from spotlight_jax.selector.selection import row_budgets, sparse_from

SMALLEST_PIECE = 16  # tokens of the smallest program that ends a prompt
STEP = 4  # from one length of the cache to the next: each is compiled
SHORTEST = 512  # slots of the shortest cache on a CPU, where a dense step reads all slots, filled or not


@dataclasses.dataclass
class Prefill:
    """A prompt on its way into the cache."""

    prompt: np.ndarray
    end: int  # tokens of the sequence at its end, which the selector's set and dynamic RoPE go by
    row: RowConfig
    selection: SelectionConfig
    has_logprobs: bool
    code_set: int
    selectors: LayerSelectors
    done: int = 0  # tokens cached
    last: Array | None = None  # the stream of the prompt's last token

    @property
    def is_whole(self) -> bool:
        """Whether all tokens are cached."""
        return self.done >= len(self.prompt)


def join_row(
    state: DecodeState, layers: tuple[LayerCache, ...], one: DecodeState, slot: Int32[Array, ""]
) -> DecodeState:
    """Return the batch with a sequence in one of its slots.

    Args:
        state: the batch.
        layers: of the sequence, at least as long as the batch's.
        one: the sequence, without layers.
        slot: of the batch.
    """
    cache = dataclasses.replace(one.cache, layers=cut(layers, state.cache.max_len))
    return insert_row(state, dataclasses.replace(one, cache=cache), slot, jnp.int32(0))


def resize_state(state: DecodeState, max_len: int) -> DecodeState:
    """Return the batch with longer or shorter caches."""
    return dataclasses.replace(state, cache=resize(state.cache, max_len))


def ladder(context: int, is_cpu: bool) -> tuple[int, ...]:
    """Return the lengths of caches that steps are compiled for; only the longest where steps skip empty slots."""
    lengths = [context]
    while is_cpu and lengths[0] >= STEP * SHORTEST:
        lengths.insert(0, -(-lengths[0] // (STEP * LANES)) * LANES)
    return tuple(lengths)


def cache_length(context: int, chunk: int) -> int:
    """Return the slots of a cache for `context` tokens: a chunk is written whole, and one token after the last."""
    return -(-(-(-(context + 1) // chunk) * chunk) // LANES) * LANES


class Slots:
    """Slots of a batch on the device, one row to prefill in, and pages of prompts that were prefilled."""

    def __init__(self, engine: Engine, slots: int, context: int, chunk: int, pages: int) -> None:
        """Allocate everything; nothing is compiled yet.

        Args:
            engine: with its model and selector.
            slots: sequences decoded at once.
            context: most tokens of a sequence, prompt and answer.
            chunk: prompt tokens prefilled at once, and of a page.
            pages: chunks of prompts that are kept; 0: none.
        """
        self.engine, self.count, self.context, self.chunk, self.pages = engine, slots, context, chunk, pages
        self.max_len = cache_length(context, chunk)
        self.lengths_compiled = ladder(self.max_len, jax.default_backend() == "cpu")
        self.sizes = (*(size for size in (chunk // 16, chunk // 4) if size >= SMALLEST_PIECE), chunk)
        self.sets = 1 if engine.selector is None else len(engine.selector.sets)
        self.has_selector = any(selector is not None for selector in engine.selectors(np.zeros(1, np.int32)))
        self.reset()

    def reset(self) -> None:
        """Allocate everything anew: all slots are free, and no page holds anything."""
        engine = self.engine
        self.reset_prefill()
        state = engine.empty_state(self.count, 1)
        cache = engine.empty_cache(self.count, self.lengths_compiled[0])
        reads = row_budgets([engine.cfg.selection] * self.count, self.count, jax.default_backend())
        has_logprobs = jnp.zeros((self.count,), bool)
        self.state = dataclasses.replace(state, cache=cache, reads=reads, has_logprobs=has_logprobs)
        self.lengths, self.is_done = np.zeros(self.count, np.int64), np.ones(self.count, bool)
        self.starts, self.has_logprobs = np.array(reads.sparse_from), np.zeros(self.count, bool)
        self.logprobs: TokenLogprobs | None = None  # of what `finish` or `decode` chose last, where any sequence asks

    def reset_prefill(self) -> None:
        """Allocate the row to prefill in and the pages anew; slots keep what they hold."""
        engine = self.engine
        self.staging = engine.empty_cache(1, self.max_len).layers
        self.pool = engine.empty_cache(self.pages, self.chunk).layers if self.pages else None
        self._unfilled = [layer.moments for layer in engine.empty_cache(1, self.chunk).layers]

    def set_of(self, end: int) -> int:
        """Return which of the selector's sets of hash functions serves a sequence of this length at its end."""
        return 0 if self.engine.selector is None else self.engine.selector.set_of(end)

    def sparse_from(self, selection: SelectionConfig) -> int:
        """Return the length from which a sequence with this selection is read sparsely."""
        return sparse_from(selection, self.count, jax.default_backend()) if self.has_selector else LONGEST + 1

    def begin(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        row: RowConfig,
        selection: SelectionConfig,
        has_logprobs: bool = False,
        pages: Sequence[int] = (),
    ) -> Prefill:
        """Start with a prompt, in place of any that was not finished.

        Args:
            prompt: token ids.
            max_new_tokens: at most.
            row: how the sequence goes on.
            selection: how much its steps read, at no length more than the engine's own; of it alone `keep`, `budget`,
                `min_tokens` and `min_context` are the sequence's own.
            has_logprobs: whether `logprobs` is wanted of its tokens.
            pages: of its first chunks, which leave at least one token to prefill.
        """
        end = len(prompt) + max_new_tokens
        code_set = self.set_of(end)
        # moments begin anew, as copies: their buffers are given up
        layers = zip(self.staging, self._unfilled, strict=True)
        self.staging = tuple(
            dataclasses.replace(layer, moments=jax.tree.map(jnp.copy, empty)) for layer, empty in layers
        )
        for index, page in enumerate(pages):
            self._copy("load", page, index * self.chunk)
        selectors = self.engine.selectors(np.asarray([code_set], np.int32))
        done = len(pages) * self.chunk
        return Prefill(np.asarray(prompt, np.int32), end, row, selection, has_logprobs, code_set, selectors, done)

    def kind_of(self, end: int) -> int:
        """Return what a page depends on apart from its tokens, by a sequence's length at its end."""
        rope = self.engine.model_cfg.rope
        is_own = rope.kind == "dynamic" and end > rope.trained_len  # its keys are turned for this length alone
        return self.set_of(end) + (end << 8 if is_own else 0)

    def next_size(self, prefill: Prefill) -> int:
        """Return the tokens that the next `advance` works on, padding included."""
        left = len(prefill.prompt) - prefill.done
        return next((size for size in self.sizes if size >= left), self.chunk)

    def advance(self, prefill: Prefill) -> bool:
        """Prefill one more chunk; returns whether it was a whole one, which `keep` can make a page of."""
        size = self.next_size(prefill)
        tokens = np.zeros((1, size), np.int32)
        piece = prefill.prompt[prefill.done : prefill.done + size]
        tokens[0, : len(piece)] = piece
        starts, rope_len, ends = (
            jnp.asarray([number], jnp.int32) for number in (prefill.done, prefill.end, len(prefill.prompt))
        )
        x, layers = self.engine.prefill_chunk(tokens, list(self.staging), prefill.selectors, starts, rope_len, ends)
        self.staging = tuple(layers)
        prefill.last = x[jnp.arange(1), jnp.asarray([len(piece) - 1])]  # a number inside an index would be compiled
        prefill.done += len(piece)
        return len(piece) == self.chunk

    def keep(self, prefill: Prefill, page: int) -> None:
        """Copy the chunk that `advance` has just cached to a page."""
        self._copy("save", page, prefill.done - self.chunk)

    def _copy(self, name: str, page: int, start: int) -> None:
        assert self.pool is not None, "there are pages"
        place, row = (np.int32(page), np.int32(0)), (np.int32(0), np.int32(start))
        if name == "save":
            args = (self.pool, self.staging, *place, *row)
            self.pool = self.engine.run(name, copy_tokens, args, (0,), length=self.chunk)
        else:
            args = (self.staging, self.pool, *row, *place)
            self.staging = self.engine.run(name, copy_tokens, args, (0,), length=self.chunk)

    def finish(self, prefill: Prefill, slot: int) -> int:
        """Choose a whole prompt's first token and put the sequence into a slot.

        Returns: the token, or `NOT_FINITE`, with which the slot stays free, as it does where nothing follows.
        """
        length = len(prefill.prompt)
        row = prefill.row
        one = DecodeState(
            cache=Cache((), jnp.asarray([length], jnp.int32), jnp.asarray([prefill.code_set], jnp.int32)),
            tokens=jnp.zeros((1,), jnp.int32),
            is_done=jnp.zeros((1,), bool),
            left=jnp.asarray([prefill.end - length], jnp.int32),
            chosen=jnp.zeros((1,), jnp.int32),
            rope_len=jnp.asarray([prefill.end], jnp.int32),
            sampling=batch_sampling([row.sampling], [row.number]),
            stop_tokens=jnp.asarray([padded_stops(row)], jnp.int32),
            reads=row_budgets([prefill.selection], self.count, jax.default_backend()),
            has_logprobs=jnp.asarray([prefill.has_logprobs]),
        )
        engine = self.engine
        args = (engine.params, prefill.last, one)
        one, logprobs = engine.run("first_token", first_token, args, (2,), model_cfg=engine.model_cfg)
        self.logprobs = jax.device_get(logprobs) if prefill.has_logprobs else None
        token, is_done = int(one.tokens[0]), bool(one.is_done[0])
        if token == NOT_FINITE or is_done:
            return token
        self._fit(length + 1)
        self.state = engine.run("join", join_row, (self.state, self.staging, one, np.int32(slot)), (0,))
        self.lengths[slot], self.is_done[slot] = length, False
        self.starts[slot], self.has_logprobs[slot] = self.sparse_from(prefill.selection), prefill.has_logprobs
        return token

    def decode(self, limit: int) -> np.ndarray:
        """Decode one block of at most `limit` steps.

        Returns: the tokens chosen, [slots, steps], fewer steps where the way of reading changes or all are done; a
        sequence that is done repeats its last, which is `NOT_FINITE` where its logits were not.
        """
        longest = int(self.lengths[~self.is_done].max())
        limit = min(limit, self.max_len - longest)
        self._fit(longest + limit)
        if self.sets > 1:  # free slots take anybody's set: where all have the same, a step is simpler
            held = np.array(self.state.cache.code_sets)
            self._use_sets(np.where(self.is_done, held[~self.is_done][0], held))
        mode, steps = self.engine.mode_of(self.lengths, self.is_done, self.starts)
        is_asked = (self.has_logprobs & ~self.is_done).any()
        tokens, logprobs = self._decode_block(mode, min(steps, limit))
        self.logprobs = jax.device_get(logprobs) if is_asked else None
        self._look()
        return tokens

    def _decode_block(self, mode: Mode, steps: int) -> tuple[np.ndarray, TokenLogprobs | None]:
        """See `Engine.decode_block`; on a CPU layer by layer, which compiles in a fraction of the time."""
        if jax.default_backend() == "cpu":
            self.state, tokens, logprobs = decode_layer_by_layer(self.engine, self.state, mode, steps)
        else:
            self.state, tokens, logprobs = self.engine.decode_block(self.state, mode, steps)
        return tokens, logprobs

    def _use_sets(self, sets: np.ndarray) -> None:
        """Say which sets of hash functions slots use."""
        cache = dataclasses.replace(self.state.cache, code_sets=jnp.asarray(sets, jnp.int32))
        self.state = dataclasses.replace(self.state, cache=cache)

    def _look(self) -> None:
        self.lengths = np.array(self.state.cache.lengths, np.int64)
        self.is_done = np.array(self.state.is_done)

    def free(self, slots: Sequence[int]) -> None:
        """Free slots; where those that go on need less, caches become shorter."""
        self.state = self.engine.free(self.state, slots)
        self._look()
        running = self.lengths[~self.is_done]
        if len(running) == 0 or 4 * running.max() < self.state.cache.max_len:
            self._fit(int(running.max(initial=0)), may_shrink=True)

    def _fit(self, tokens: int, may_shrink: bool = False) -> None:
        """Make caches long enough for so many tokens, one compiled length after another."""
        rungs = self.lengths_compiled
        wanted = next(place for place, length in enumerate(rungs) if length >= tokens)
        place = rungs.index(self.state.cache.max_len)
        while place < wanted or (may_shrink and place > wanted):
            place += 1 if place < wanted else -1
            name, args = f"resize to {rungs[place]}", (self.state,)
            self.state = self.engine.run(name, resize_state, args, (), max_len=rungs[place])

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compile every program that requests will need, by running each on nothing.

        Args:
            progress: gets the parts done so far, all of them, and what the last one is for.
        """
        row, selection, done = RowConfig(), self.engine.cfg.selection, 0
        modes: tuple[Mode, ...] = ("dense", "sparse", "mixed") if self.has_selector else ("dense",)
        ways = [np.zeros(self.count, np.int32)]  # all slots use one set of hash functions, or several
        if self.sets > 1 and self.count > 1:
            ways.append(np.arange(self.count, dtype=np.int32) % self.sets)
        parts = len(self.sizes) + len(self.lengths_compiled) * len(modes) * len(ways)

        def count(what: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, parts, what)

        for size in self.sizes:
            prefill = self.begin([0] * size, 1, row, selection)
            is_page = self.advance(prefill)
            if is_page and self.pages:
                self.keep(prefill, 0)
                self.begin([0] * size, 1, row, selection, pages=[0])
            self.finish(prefill, 0)
            count(f"prefill of {size} tokens")
        for length in self.lengths_compiled:
            self._fit(length)
            prefill = self.begin([0], 2, row, selection)
            self.advance(prefill)
            self.finish(prefill, 0)
            for sets, mode in itertools.product(ways, modes):
                self._use_sets(sets)
                self._decode_block(mode, 1)
                count(f"{mode} steps, caches of {length} tokens")
            self.free([0])  # and back to the shortest
        self.reset()
