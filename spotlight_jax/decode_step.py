"""What the device computes in prefill and decoding: pure functions of params, cache and state.

Sequences of a batch are filled from slot 0 on, so positions are those of each sequence alone; what a shorter prompt
leaves behind it is never read and later overwritten.
"""

import dataclasses
from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PyTree

from spotlight_jax.cache import Cache, LayerCache
from spotlight_jax.cached_attention import (
    LayerSelector,
    attend_chunk,
    attend_densely,
    attend_sparsely,
    fold_layers,
    fold_one,
    read_densely,
)
from spotlight_jax.config.generation import MOST_STOPS, AttentionImpl, DecodeConfig, RowConfig
from spotlight_jax.config.selection import SelectionConfig, check_layers
from spotlight_jax.models.config import DecoderConfig
from spotlight_jax.models.decoder import apply_layer, embed_tokens, unembed
from spotlight_jax.models.sharding import by_heads, on_own_slots, tokens_over
from spotlight_jax.sampling import NOT_FINITE, Sampling, TokenLogprobs, empty_logprobs, sample, token_logprobs
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.selection import RowBudgets, sparse_from

Mode = Literal["dense", "sparse", "mixed"]  # what the sparse layers do in a block: by length, sequences may differ

NO_TOKEN = -2  # where a sequence has fewer stop tokens than there is room for; no id, and not NOT_FINITE
_CODED_AT_ONCE = 2048  # cached tokens whose codes are made together


@flax.struct.dataclass
class DecodeState:
    """State of a batch between two blocks of decoding."""

    cache: Cache
    tokens: Int32[Array, "batch"]  # chosen last, not cached yet
    is_done: Bool[Array, "batch"]
    left: Int32[Array, "batch"]  # tokens that may still be chosen
    chosen: Int32[Array, "batch"]  # tokens chosen since the prompt: the draw's number
    rope_len: Int32[Array, "batch"]  # length that `dynamic` RoPE adapts to; the same for prompt and steps
    sampling: Sampling
    stop_tokens: Int32[Array, "batch stops"]  # that end each sequence, and NO_TOKEN
    reads: RowBudgets | None = None  # how much each sequence reads; None: all what the compiled step's selection says
    has_logprobs: Bool[Array, "batch"] | None = None  # whose tokens' log-probabilities are asked for; None: nobody's


Block = tuple[Int32[Array, "batch block"], TokenLogprobs | None]  # tokens chosen, and their log-probabilities
Steps = tuple[Int32[Array, ""], DecodeState, Block]  # taken so far, the state after them, what they chose


def next_lengths(state: DecodeState) -> Int32[Array, "batch"]:
    """Return the sequences' lengths after a step; one that is done keeps its length, and always writes to one slot."""
    return state.cache.lengths + (~state.is_done).astype(jnp.int32)


def padded_stops(row: RowConfig) -> list[int]:
    """Return a sequence's stop tokens, filled up with NO_TOKEN."""
    return [*row.stop_tokens, *[NO_TOKEN] * (MOST_STOPS - len(row.stop_tokens))]


LayerSelectors = tuple[LayerSelector | None, ...]  # of all layers; None for those that are always read densely


def layer_selectors(
    selector: Selector | None, layers: int, cfg: SelectionConfig, has_tail: bool = True
) -> tuple[LayerSelectors, ...]:
    """Return each layer's hash function, for each of the selector's sets of them.

    Args:
        has_tail: False drops the corrections of the estimate of what is not read, and with them the estimate.
    """
    check_layers(cfg.dense_layers, layers)
    if selector is None:
        return ((None,) * layers,)
    sets = selector.sets if has_tail else [dataclasses.replace(functions, tail=None) for functions in selector.sets]
    return tuple(
        tuple(None if layer in cfg.dense_layers else LayerSelector(params.layer(layer)) for layer in range(layers))
        for params in sets
    )


def code_layer(layer: LayerCache, selector: LayerSelector) -> LayerCache:
    """Return the layer with this hash function's codes of its keys, made in blocks that are small next to a cache."""
    assert layer.codes is not None, "a layer with a selector keeps codes"
    max_len = layer.keys.shape[1]
    block = min(_CODED_AT_ONCE, max_len)

    def code_block(index: Array, codes: Array) -> Array:
        first = jnp.minimum(index * block, max_len - block)  # the last block may overlap the one before it
        keys = lax.dynamic_slice_in_dim(layer.keys, first, block, axis=1)
        return lax.dynamic_update_slice_in_dim(codes, selector.key_codes(keys), first, axis=3)

    return dataclasses.replace(layer, codes=lax.fori_loop(0, -(-max_len // block), code_block, layer.codes))


def prefill_layer(
    layer_params: PyTree,
    x: Float[Array, "batch q_len embed"],
    layer: LayerCache,
    selector: LayerSelector | None,
    starts: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    cfg: DecoderConfig,
    implementation: AttentionImpl,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "batch q_len embed"], LayerCache]:
    """Apply one layer to one chunk of the prompt; tokens from `ends` on are padding."""
    positions = starts[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]

    def attend(
        queries: Array, keys: Array, values: Array, layer: LayerCache, selector: LayerSelector | None,
        starts: Array, ends: Array,
    ) -> tuple[Array, LayerCache]:  # fmt: skip
        return attend_chunk(queries, keys, values, layer, starts, selector, implementation, ends, tokens_over(mesh))

    return apply_layer(layer_params, x, positions, by_heads(attend, mesh, layer, selector, starts, ends), cfg, rope_len)


def rows_of_step(batch: int) -> int:
    """Return the number of rows of a step's products with weights.

    One more than a single sequence has: XLA for GPUs makes sums of products with one row. It does not merge them, and
    computes them anew, weights and all, where it fuses them with what follows.
    """
    return 2 if batch == 1 and jax.default_backend() == "gpu" else batch


def decode_layer(
    layer_params: PyTree,
    x: Float[Array, "rows one embed"],
    layer: LayerCache,
    selector: LayerSelector | None,
    lengths: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    reads: RowBudgets | None,
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "rows one embed"], LayerCache]:
    """Apply one layer to one more token of each sequence; moments are left to `fold_layers`.

    Args:
        x: the stream before the layer; rows behind the batch are copies (`rows_of_step`).
        lengths: tokens each sequence has cached.
        reads: how much each sequence reads; None: what `cfg.selection` says.
    """
    batch, rows, axis = lengths.shape[0], x.shape[0], tokens_over(mesh)

    def fill(array: Array) -> Array:
        return jnp.broadcast_to(array, (rows, *array.shape[1:]))

    shortest = sparse_from(cfg.selection, batch, jax.default_backend())

    def read_all(
        queries: Array, keys: Array, values: Array, layer: LayerCache, selector: LayerSelector | None, lengths: Array
    ) -> tuple[Array, LayerCache]:
        return attend_densely(queries, keys, values, layer, lengths, selector, cfg.attention, axis)

    def read_some(
        queries: Array, keys: Array, values: Array, layer: LayerCache, selector: LayerSelector,
        lengths: Array, reads: RowBudgets | None,
    ) -> tuple[Array, LayerCache]:  # fmt: skip
        budgets = None if reads is None else reads.at(lengths + 1)
        return attend_sparsely(queries, keys, values, layer, lengths, selector, cfg.selection, budgets, axis)

    def attend_cached(
        queries: Array, keys: Array, values: Array, layer: LayerCache, selector: LayerSelector | None,
        lengths: Array, reads: RowBudgets | None,
    ) -> tuple[Array, LayerCache]:  # fmt: skip
        if selector is None or mode == "dense":
            return read_all(queries, keys, values, layer, selector, lengths)
        sparse, appended = read_some(queries, keys, values, layer, selector, lengths, reads)
        if mode == "sparse":
            return sparse, appended
        is_sparse = lengths + 1 >= (shortest if reads is None else reads.sparse_from)
        dense = read_densely(queries, appended, lengths, cfg.attention, ~is_sparse, axis)
        return jnp.where(is_sparse[:, None, None, None], sparse, dense), appended

    own = by_heads(attend_cached, mesh, layer, selector, lengths, reads)

    def attend(*new: Array) -> tuple[Array, LayerCache]:
        out, appended = own(*(heads[:batch] for heads in new))
        return fill(out), appended

    return apply_layer(layer_params, x, fill(lengths)[:, None], attend, model_cfg, fill(rope_len))


# Traced and lowered once for all layers of a kind; XLA puts its calls in line again. On a CPU alone, where that saves a
# fifth of half a minute of compiling: programs for GPUs were not timed with it.
_decode_layer_once = jax.jit(decode_layer, static_argnames=("model_cfg", "cfg", "mode", "mesh"))


def fold_step(
    layers: tuple[LayerCache, ...], lengths: Int32[Array, "batch"], ends: Int32[Array, "batch"], mesh: Mesh | None
) -> tuple[LayerCache, ...]:
    """Return the layers with moments of the blocks that this step has filled, if any; args as `fold_layers`."""
    axis = tokens_over(mesh)
    if mesh is None or axis is None:
        return fold_layers(layers, lengths, ends, fold_one)
    return fold_layers(layers, lengths, ends, partial(on_own_slots, partial(fold_one, axis=axis), mesh))


def embed_step(params: PyTree, tokens: Int32[Array, "batch"], model_cfg: DecoderConfig) -> Float[Array, "rows 1 embed"]:
    """Return the stream of one more token of each sequence before the first layer."""
    rows = rows_of_step(tokens.shape[0])
    return embed_tokens(params, jnp.broadcast_to(tokens, (rows,))[:, None], model_cfg)


def decode_step(
    params: PyTree,
    selectors: LayerSelectors,
    cache: Cache,
    tokens: Int32[Array, "batch"],
    rope_len: Int32[Array, "batch"],
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
    ends: Int32[Array, "batch"] | None = None,
    reads: RowBudgets | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Return logits after one more token of each sequence, and the cache with it; lengths are left to the caller.

    Args:
        ends: the lengths that follow, which are those before where a sequence is done; None: none is.
        reads: how much each sequence reads; None: what `cfg.selection` says.
        mesh: that weights and cache lie on; None: one device.
    """
    lengths, batch = cache.lengths, tokens.shape[0]
    step_layer = _decode_layer_once if jax.default_backend() == "cpu" else decode_layer
    x, layers = embed_step(params, tokens, model_cfg), []
    for index, (layer, selector) in enumerate(zip(cache.layers, selectors, strict=True)):
        held = params[f"layer_{index}"], x, layer, selector
        x, appended = step_layer(*held, lengths, rope_len, reads, model_cfg=model_cfg, cfg=cfg, mode=mode, mesh=mesh)
        layers.append(appended)
    folded = fold_step(tuple(layers), lengths, lengths + 1 if ends is None else ends, mesh)
    return unembed(params, x, model_cfg)[:batch, 0], dataclasses.replace(cache, layers=folded)


def choose(logits: Float[Array, "batch vocab"], state: DecodeState) -> tuple[DecodeState, TokenLogprobs | None]:
    """Draw each sequence's next token, and see who is done; log-probabilities are zeros where nobody asks for them."""
    tokens = jnp.where(state.is_done, state.tokens, sample(logits, state.sampling, state.chosen))
    logprobs = None
    if state.has_logprobs is not None:
        logprobs = lax.cond(
            jnp.any(state.has_logprobs & ~state.is_done),
            lambda: token_logprobs(logits, tokens),
            lambda: empty_logprobs(tokens.shape, logits.shape[-1]),
        )
    running = (~state.is_done).astype(jnp.int32)
    left = state.left - running
    is_stop = jnp.any(tokens[:, None] == state.stop_tokens, axis=1)
    is_done = state.is_done | is_stop | (left <= 0) | (tokens == NOT_FINITE)
    state = dataclasses.replace(state, tokens=tokens, left=left, chosen=state.chosen + running, is_done=is_done)
    return state, logprobs


def first_token(
    params: PyTree, x: Float[Array, "batch embed"], state: DecodeState, model_cfg: DecoderConfig
) -> tuple[DecodeState, TokenLogprobs | None]:
    """Choose the first token after the prompt, from the stream of its last one; with log-probabilities if any asks."""
    return choose(unembed(params, x[:, None], model_cfg)[:, 0], state)


def insert_row(state: DecodeState, other: DecodeState, slot: Int32[Array, ""], row: Int32[Array, ""]) -> DecodeState:
    """Return a batch with one sequence of another batch, whose cache is not longer, in one of its slots."""

    def insert(leaf: Array, own: Array) -> Array:
        one = lax.dynamic_slice_in_dim(own, row, 1, axis=0)
        return lax.dynamic_update_slice(leaf, one, (slot, *[jnp.int32(0)] * (leaf.ndim - 1)))

    return jax.tree.map(insert, state, other)


def free_rows(state: DecodeState, is_free: Bool[Array, "batch"]) -> DecodeState:
    """Return a batch in which some sequences are done and hold nothing."""
    cache = dataclasses.replace(state.cache, lengths=jnp.where(is_free, 0, state.cache.lengths))
    return dataclasses.replace(state, cache=cache, is_done=state.is_done | is_free)


def decode_block(
    params: PyTree,
    selectors: LayerSelectors,
    state: DecodeState,
    limit: Int32[Array, ""],
    model_cfg: DecoderConfig,
    cfg: DecodeConfig,
    mode: Mode,
    mesh: Mesh | None = None,
) -> tuple[DecodeState, Block, Int32[Array, ""]]:
    """Take up to `limit` (at most cfg.block) steps, fewer where every sequence is done before.

    Returns:
        The state, the tokens chosen (a sequence that is done repeats its last) and their log-probabilities, and how
            many steps were taken.
    """

    def is_running(carry: Steps) -> Array:
        step, state, _ = carry
        return (step < limit) & ~jnp.all(state.is_done)

    def take_step(carry: Steps) -> Steps:
        step, state, out = carry
        ends = next_lengths(state)
        args = (
            params,
            selectors,
            state.cache,
            state.tokens,
            state.rope_len,
            model_cfg,
            cfg,
            mode,
            ends,
            state.reads,
            mesh,
        )
        logits, cache = decode_step(*args)
        cache = dataclasses.replace(cache, lengths=ends)
        state, logprobs = choose(logits, dataclasses.replace(state, cache=cache))

        def write(held: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(held, new[:, None], step, axis=1)

        return step + 1, state, jax.tree.map(write, out, (state.tokens, logprobs))

    shape = state.tokens.shape[0], cfg.block
    logprobs = None if state.has_logprobs is None else empty_logprobs(shape, model_cfg.vocab)
    out = jnp.zeros(shape, jnp.int32), logprobs
    steps, state, out = lax.while_loop(is_running, take_step, (jnp.int32(0), state, out))
    return state, out, steps
