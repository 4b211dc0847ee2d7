"""Attention of new tokens over one layer's cache: append first, then read everything, or only what was selected.

Three ways, one shape: `attend_chunk` for prefill, `attend_densely` and `attend_sparsely` for a decoding step. Each
takes what a decoder layer hands to its `attend`, and the layer's cache, and returns the outputs and the cache with
the new tokens in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from spotlight_jax.attention import causal_attention
from spotlight_jax.cache import LayerCache, append
from spotlight_jax.config.generation import AttentionImpl
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.kernels.sparse_attention import estimated_attention, sparse_attention
from spotlight_jax.moments import Moments, block_start, fold
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.scoring import hash_score_range, output_scores
from spotlight_jax.selector.selection import select_by_codes, select_tokens
from spotlight_jax.tail import TailParams
from spotlight_jax.token_axis import first_slot, join_sums

BLOCK = 512  # cached tokens that a prefill chunk reads at once
MASKED = -1e30  # not -inf: a row that has seen no key yet must stay finite
# On a CPU, products batched over KV heads make XLA transpose the whole cache; below this many KV heads it is cheaper
# to multiply with queries that are zero outside their own head.
FEW_KV_HEADS = 4


@flax.struct.dataclass
class LayerSelector:
    """One layer's hash function, or one of several for each sequence of a batch."""

    functions: HashFunctions  # leaves lead with an axis of sets where there is `sets`
    sets: Int32[Array, "batch"] | None = None  # which set each sequence uses; None: there is one for all

    def key_codes(
        self, keys: Float[Array, "batch q_len kv_heads head_dim"]
    ) -> UInt32[Array, "batch code_heads words q_len"]:
        """Return packed codes of keys; see `HashFunctions.key_codes`."""
        if self.sets is None:
            return self.functions.key_codes(keys)
        return jax.vmap(lambda functions, own: functions.key_codes(own[None])[0])(self._by_row(), keys)

    def hash_queries(
        self, queries: Float[Array, "batch q_len q_heads head_dim"]
    ) -> Float[Array, "batch q_len q_heads code_bits"]:
        """See `HashFunctions.hash_queries`."""
        if self.sets is None:
            return self.functions.hash_queries(queries)
        return jax.vmap(lambda functions, own: functions.hash_queries(own))(self._by_row(), queries)

    def integer_weights(
        self, outputs: Float[Array, "batch q_len q_heads code_bits"], per_kv_head: bool
    ) -> Int32[Array, "batch q_len heads score_heads code_bits"]:
        """See `HashFunctions.integer_weights`; of what `hash_queries` gave."""
        if self.sets is None:
            return self.functions.integer_weights(outputs, per_kv_head)

        def weigh(functions: HashFunctions, own: Array) -> Array:
            return functions.integer_weights(own[None], per_kv_head)[0]

        return jax.vmap(weigh)(self._by_row(), outputs)

    @property
    def tail(self) -> TailParams:
        """Corrections of the estimate of what is not read; leaves lead with the batch, or with 1 for all of it."""
        assert self.functions.tail is not None, "a layer with moments has a tail"
        return jax.tree.map(lambda leaf: leaf[None if self.sets is None else self.sets], self.functions.tail)

    def _by_row(self) -> HashFunctions:
        """Return each sequence's own hash function: leaves lead with the batch."""
        return jax.tree.map(lambda leaf: leaf[self.sets], self.functions)


def _remember(
    layer: LayerCache,
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    starts: Int32[Array, "batch"],
    selector: LayerSelector | None,
    axis: str | None = None,
) -> LayerCache:
    """Return the layer with the new tokens, and their codes where it keeps codes."""
    codes = None
    if layer.codes is not None and selector is not None:
        codes = selector.key_codes(keys)
    return append(layer, keys, values, codes, starts, axis)


def attend_chunk(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    layer: LayerCache,
    starts: Int32[Array, "batch"],
    selector: LayerSelector | None = None,
    implementation: AttentionImpl = "auto",
    ends: Int32[Array, "batch"] | None = None,
    axis: str | None = None,
) -> tuple[Float[Array, "batch q_len q_heads head_dim"], LayerCache]:
    """Return dense causal attention of a chunk of a prompt to the cache before it and to itself, and the layer with it.

    Args:
        starts: tokens each sequence has cached before the chunk.
        selector: writes the new tokens' codes, where the layer keeps any.
        implementation: "cudnn" takes two fused calls (the cache before the chunk, and the chunk itself) and merges
            them; "xla" walks over filled blocks of the cache; "auto" takes cuDNN on a GPU for 16-bit floats.
        ends: tokens of each sequence with the chunk, its padding apart; None: it has none.
        axis: over which the layer's slots are split (`token_axis`); each device reads its own, block by block.
    """
    layer = _remember(layer, keys, values, starts, selector, axis)
    if selector is not None and layer.moments is not None:
        ends = starts + keys.shape[1] if ends is None else jnp.clip(ends, starts, starts + keys.shape[1])
        folded = fold(layer.moments, layer.keys, layer.values, starts, ends, keys.shape[1], axis)
        layer = dataclasses.replace(layer, moments=folded)
    if implementation == "auto":
        is_fused = jax.default_backend() == "gpu" and queries.dtype in (jnp.bfloat16, jnp.float16)
        implementation = "cudnn" if is_fused and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 128 else "xla"
    if implementation == "cudnn" and axis is None:
        return _chunk_by_cudnn(queries, keys, values, layer, starts), layer
    return _chunk_by_blocks(queries, layer, starts, axis), layer


def _chunk_by_cudnn(
    queries: Array, keys: Array, values: Array, layer: LayerCache, starts: Int32[Array, "batch"]
) -> Array:
    """Attend by two fused calls, merged by log-sum-exp: cuDNN's causal mask fits only as many queries as keys."""

    def attend(past_keys: Array, past_values: Array, **options: Any) -> tuple[Array, Array]:
        return jax.nn.dot_product_attention(
            queries, past_keys, past_values, implementation="cudnn", return_residual=True, **options
        )

    own, own_sum = attend(keys.astype(queries.dtype), values.astype(queries.dtype), is_causal=True)
    past, past_sum = attend(layer.keys, layer.values, key_value_seq_lengths=starts)
    has_past = (starts > 0)[:, None, None]  # without one, what cuDNN returns is not defined
    past_sum = jnp.where(has_past, past_sum, -jnp.inf)
    share = jax.nn.sigmoid(past_sum - own_sum)[..., None]  # exp(past) / (exp(past) + exp(own))
    past = jnp.where(has_past[..., None], past, jnp.zeros_like(past))
    return (share * past + (1 - share) * own).astype(queries.dtype)


def _chunk_by_blocks(queries: Array, layer: LayerCache, starts: Int32[Array, "batch"], axis: str | None) -> Array:
    """Build softmax up block by block over the filled part of the cache: no n x n matrix, no block past the end."""
    batch, q_len, q_heads, head_dim = queries.shape
    max_len, kv_heads = layer.keys.shape[1:3]
    block = min(BLOCK, max_len)
    group, own = q_heads // kv_heads, first_slot(max_len, axis)
    scaled = queries * jnp.asarray(head_dim**-0.5, queries.dtype)
    grouped = scaled.reshape(batch, q_len, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = starts[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None, :]

    def add_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, outputs = carry
        first = jnp.minimum(index * block, max_len - block)  # the last block may overlap the one before it
        block_keys = lax.dynamic_slice_in_dim(layer.keys, first, block, axis=1)
        block_values = lax.dynamic_slice_in_dim(layer.values, first, block, axis=1)
        places = first + jnp.arange(block, dtype=jnp.int32)[None, None, :]
        visible = (own + places <= rows[:, :, None]) & (places >= index * block)
        scores = jnp.einsum("bkgtd,bskd->bkgts", grouped, block_keys, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        raised = jnp.maximum(highest, scores.max(axis=-1))
        shares = jnp.exp(scores - raised[..., None])
        fade = jnp.exp(highest - raised)
        added = jnp.einsum(
            "bkgts,bskd->bkgtd", shares.astype(block_values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return raised, total * fade + shares.sum(axis=-1), outputs * fade[..., None] + added

    filled = jnp.clip(jnp.max(starts) + q_len - own, 0, max_len)
    blocks = (filled + block - 1) // block
    shape = (batch, kv_heads, group, q_len)
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    highest, total, outputs = lax.fori_loop(0, blocks, add_block, start)
    if axis is not None:
        share = jnp.exp(highest - lax.pmax(highest, axis))  # 0 where a query sees nothing of what lies here
        total, outputs = join_sums((total * share, outputs * share[..., None]), axis)
    outputs = (outputs / total[..., None]).transpose(0, 3, 1, 2, 4)
    return outputs.reshape(queries.shape).astype(queries.dtype)


def attend_densely(
    queries: Float[Array, "batch one q_heads head_dim"],
    keys: Float[Array, "batch one kv_heads head_dim"],
    values: Float[Array, "batch one kv_heads head_dim"],
    layer: LayerCache,
    lengths: Int32[Array, "batch"],
    selector: LayerSelector | None = None,
    implementation: AttentionImpl = "auto",
    axis: str | None = None,
) -> tuple[Float[Array, "batch one q_heads head_dim"], LayerCache]:
    """Take one decoding step that reads the whole cache; codes are written all the same, for later steps.

    Args:
        lengths: tokens each sequence has cached before this one.
        selector: None where the layer keeps no codes.
        axis: over which the layer's slots are split (`token_axis`).
    """
    layer = _remember(layer, keys, values, lengths, selector, axis)
    return read_densely(queries, layer, lengths, implementation, axis=axis), layer


def read_densely(
    queries: Float[Array, "batch one q_heads head_dim"],
    layer: LayerCache,
    lengths: Int32[Array, "batch"],
    implementation: AttentionImpl = "auto",
    is_read: Bool[Array, "batch"] | None = None,
    axis: str | None = None,
) -> Float[Array, "batch one q_heads head_dim"]:
    """Return attention of one query of each sequence to all of its cache, which holds the newest token.

    Args:
        lengths: tokens before the newest.
        is_read: sequences whose outputs are used: the others' are anything, and cost next to nothing; None: all.
        axis: over which the layer's slots are split (`token_axis`); each device reads its own, of all sequences.
    """
    if axis is not None:
        return _chunk_by_blocks(queries, layer, lengths, axis)
    is_on_cpu = jax.default_backend() == "cpu"
    is_wide = implementation == "auto" and is_on_cpu and layer.keys.shape[2] <= FEW_KV_HEADS

    def read(queries: Array, keys: Array, values: Array, lengths: Array) -> Array:
        if is_wide:
            return _read_by_wide_product(queries, keys, values, lengths)
        return causal_attention(queries, keys, values, offsets=lengths, implementation=implementation)

    def skip(queries: Array, *_: Array) -> Array:
        return jnp.zeros_like(queries)

    cached = queries, layer.keys, layer.values
    if is_read is None and is_wide:
        # XLA for CPUs would repeat the write of the newest token inside a reshaped read of the cache, and then had to
        # copy the cache in every step; a branch, whose outcome it cannot know, keeps the two apart.
        return lax.cond(lengths[0] >= 0, read, skip, *cached, lengths)
    if is_read is None:
        return read(*cached, lengths)
    if not is_on_cpu:
        return read(*cached, jnp.where(is_read, lengths, 0))

    def read_row(row: Array) -> Array:
        def own(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, row, 1, axis=0)

        return lax.cond(is_read[row], lambda: read(*map(own, (*cached, lengths))), lambda: skip(own(queries)))[0]

    return lax.map(read_row, jnp.arange(queries.shape[0], dtype=jnp.int32))


def _read_by_wide_product(queries: Array, keys: Array, values: Array, lengths: Int32[Array, "batch"]) -> Array:
    """Attend with all heads as columns of one matrix product with the cache as it lies in memory."""
    batch, _, q_heads, head_dim = queries.shape
    max_len, kv_heads = keys.shape[1:3]
    dtype = keys.dtype
    own_head = jnp.eye(kv_heads, dtype=dtype)
    grouped = queries[:, 0].reshape(batch, kv_heads, q_heads // kv_heads, head_dim) * head_dim**-0.5
    spread = jnp.einsum("bkgd,kj->bkgjd", grouped.astype(dtype), own_head)
    spread = spread.reshape(batch, q_heads, kv_heads * head_dim)
    wide_keys = keys.reshape(batch, max_len, kv_heads * head_dim)
    wide_values = values.reshape(batch, max_len, kv_heads * head_dim)
    scores = jnp.einsum("bhm,bsm->bhs", spread, wide_keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(max_len, dtype=jnp.int32)[None, None, :] <= lengths[:, None, None]
    shares = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(dtype)
    mixed = jnp.einsum("bhs,bsm->bhm", shares, wide_values, preferred_element_type=jnp.float32)
    mixed = mixed.reshape(batch, kv_heads, q_heads // kv_heads, kv_heads, head_dim)
    out = jnp.einsum("bkgjd,kj->bkgd", mixed, own_head.astype(jnp.float32))
    return out.reshape(queries.shape).astype(queries.dtype)


def attend_sparsely(
    queries: Float[Array, "batch one q_heads head_dim"],
    keys: Float[Array, "batch one kv_heads head_dim"],
    values: Float[Array, "batch one kv_heads head_dim"],
    layer: LayerCache,
    lengths: Int32[Array, "batch"],
    selector: LayerSelector,
    selection: SelectionConfig,
    budgets: Int32[Array, "batch"] | None = None,
    axis: str | None = None,
) -> tuple[Float[Array, "batch one q_heads head_dim"], LayerCache]:
    """Take one decoding step: score the codes of the cache, select tokens, and read their keys and values.

    Where the layer keeps moments, the newest tokens are read, too, and attention to the others is estimated (`tail`).

    Args:
        lengths: tokens each sequence has cached before this one.
        budgets: tokens each sequence reads; None: what `selection` says for its length.
        axis: over which the layer's slots are split (`token_axis`); its moments are of all, the same on all devices.
            What passes between devices does not grow with the length: histograms of ranks, and sums of softmax.
    """
    dtype = queries.dtype
    args = queries, keys, values, layer, lengths, selector, selection, budgets, axis
    queries, layer, indices, is_real = _append_and_select(*args)
    rows = queries[:, 0].astype(layer.keys.dtype)
    if layer.moments is None:
        out = sparse_attention(rows, layer.keys, layer.values, indices, is_real, axis=axis)
    else:
        read = rows, layer.keys, layer.values, indices, is_real, lengths + 1, layer.moments, selector.tail
        out, _ = estimated_attention(*read, axis=axis)
    return out[:, None].astype(dtype), layer


def fold_one(
    layer: LayerCache, lengths: Int32[Array, "batch"], ends: Int32[Array, "batch"], axis: str | None = None
) -> Moments:
    """Return a layer's moments with the block that a decoding step has filled, if any; args as `fold_layers`."""
    assert layer.moments is not None, "a layer without moments folds nothing"
    return fold(layer.moments, layer.keys, layer.values, lengths, ends, 1, axis)


def fold_layers(
    layers: tuple[LayerCache, ...],
    lengths: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    fold_step: Callable[[LayerCache, Array, Array], Moments],
) -> tuple[LayerCache, ...]:
    """Return the layers with moments of the blocks that a decoding step has filled, if it filled any.

    Args:
        lengths: of the sequences before the step.
        ends: after it; no more than before where a sequence is done.
        fold_step: a layer, lengths and ends to the layer's moments; see `fold_one`.
    """
    kept = {index: layer.moments for index, layer in enumerate(layers) if layer.moments is not None}
    if not kept:
        return layers

    def add_block(carry: tuple[dict[int, Moments], Array]) -> tuple[dict[int, Moments], Array]:
        folded = {
            index: fold_step(dataclasses.replace(layers[index], moments=moments), lengths, ends)
            for index, moments in carry[0].items()
        }
        return folded, jnp.zeros((), bool)

    # a loop of one round or none: unlike a branch's, its arrays stay where they are
    is_due = jnp.any(block_start(ends) > block_start(lengths))
    folded, _ = lax.while_loop(lambda carry: carry[1], add_block, (kept, is_due))
    return tuple(
        dataclasses.replace(layer, moments=folded[index]) if index in folded else layer
        for index, layer in enumerate(layers)
    )


def _append_and_select(
    queries: Float[Array, "batch one q_heads head_dim"],
    keys: Float[Array, "batch one kv_heads head_dim"],
    values: Float[Array, "batch one kv_heads head_dim"],
    layer: LayerCache,
    lengths: Int32[Array, "batch"],
    selector: LayerSelector,
    selection: SelectionConfig,
    budgets: Int32[Array, "batch"] | None,
    axis: str | None = None,
) -> tuple[Array, LayerCache, Int32[Array, "batch heads budget"], Bool[Array, "batch heads budget"]]:
    """Return the queries to read with, the layer with the new token, and what a step reads of it."""
    assert layer.codes is not None, "a layer with a selector keeps codes"
    functions, kv_heads, ends = selector.functions, keys.shape[2], lengths + 1
    per_kv_head, group = selection.per == "kv_head", queries.shape[2] // kv_heads
    adds_scores, bounds = functions.adds_scores(per_kv_head), functions.weight_bounds(group, per_kv_head)
    if per_kv_head and not adds_scores and selector.sets is None:
        queries, weights, layer = functions.append(queries, keys, values, layer, lengths, axis)
        assert layer.codes is not None
        return queries, layer, *select_by_codes(layer.codes, weights, bounds, ends, selection, budgets, axis)
    layer = _remember(layer, keys, values, lengths, selector, axis)
    assert layer.codes is not None
    outputs = selector.hash_queries(queries)
    if adds_scores:
        scores = output_scores(functions, outputs, layer.codes, per_kv_head)[:, 0]
        score_range = hash_score_range(functions, group, per_kv_head)
        return queries, layer, *select_tokens(scores, ends, selection, score_range, budgets, axis)
    weights = selector.integer_weights(outputs, per_kv_head)[:, 0]
    return queries, layer, *select_by_codes(layer.codes, weights, bounds, ends, selection, budgets, axis)
