"""Attention over a cache whose tokens lie on several devices, with the selection of a single one.

Runs under `shard_map` over an axis of the mesh (`models.sharding.by_heads` on a mesh with `context`): device i holds
the slots from i * slots on of every sequence. In a sparse step each scores its own codes. Counts of ranks by digits are
added up over the devices, 1,024 numbers a row, so that all know the same exact cut; equal ranks go to the newest
tokens, whoever has them. Each device reads what it holds of the chosen tokens, and the sums of softmax are added up:
what passes between devices does not grow with the length. Moments are of all tokens and on every device, so that what
is not read is estimated as on a single one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from spotlight_jax.cache import LayerCache, append
from spotlight_jax.cached_attention import BLOCK, MASKED, LayerSelector
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.kernels.match_score import match_score
from spotlight_jax.kernels.select_top.ranks import force_ranks
from spotlight_jax.moments import BLOCK as NEWEST
from spotlight_jax.moments import Moments, add_tokens, block_start, new_blocks, with_newest
from spotlight_jax.selector.scoring import hash_score_range, output_scores
from spotlight_jax.selector.selection import budget_of, max_budget
from spotlight_jax.tail import estimate, join, query_moments, take_off

DIGIT_BITS = 10  # of a rank that one round of counting settles: 1,024 bins


def attend_split(
    queries: Float[Array, "batch one q_heads head_dim"],
    keys: Float[Array, "batch one kv_heads head_dim"],
    values: Float[Array, "batch one kv_heads head_dim"],
    layer: LayerCache,
    selector: LayerSelector,
    lengths: Int32[Array, "batch"],
    selection: SelectionConfig,
    budgets: Int32[Array, "batch"] | None = None,
    axis: str = "context",
) -> tuple[Float[Array, "batch one q_heads head_dim"], LayerCache]:
    """Return what `cached_attention.attend_sparsely` does, from this device's part of the cache.

    Args:
        queries: of the new token, the same on all devices of the axis; so are keys, values and lengths.
        layer: this device's slots; moments are of all, the same on all devices.
        selector: its hash functions.
        lengths: tokens each sequence has cached before this one.
        selection: how many tokens are read.
        budgets: tokens each sequence reads, of all devices; None: what `selection` says for its length.
        axis: of the mesh, over which slots are split.
    """
    batch, _, q_heads, head_dim = queries.shape
    kv_heads, slots, functions = keys.shape[2], layer.keys.shape[1], selector.functions
    rows = (batch, kv_heads, q_heads // kv_heads)
    first = lax.axis_index(axis) * slots
    layer = _append_own(layer, keys, values, lengths, selector, axis)
    assert layer.codes is not None, "a layer with a selector keeps codes"
    per_kv_head, outputs = selection.per == "kv_head", selector.hash_queries(queries)
    if functions.adds_scores(per_kv_head):
        scores = output_scores(functions, outputs, layer.codes, per_kv_head)[:, 0]
    else:
        bits = functions.weight_bounds(rows[2], per_kv_head).bits
        scores = match_score(layer.codes, selector.integer_weights(outputs, per_kv_head), bits)[:, 0]
    score_range = hash_score_range(functions, rows[2], per_kv_head)
    most = max_budget(slots * int(lax.psum(1, axis)), selection)
    counts = budget_of(lengths + 1, selection) if budgets is None else jnp.minimum(budgets, most)
    mask = select_split(scores, lengths + 1, counts, first, selection, score_range, axis)
    width = min(slots, most)
    if layer.moments is not None:  # the newest are in no moment yet
        mask = with_newest(mask[:, None], lengths[:, None], first)[:, 0]
        width = min(slots, most + NEWEST)
    indices, is_real = _compact(mask, width)
    by_head = (*rows[:2], rows[2] if indices.shape[1] == q_heads else 1, width)
    indices, is_real = (jnp.broadcast_to(x.reshape(by_head), (*rows, width)) for x in (indices, is_real))
    grouped = queries[:, 0].astype(layer.keys.dtype).reshape(*rows, head_dim)
    place = jnp.arange(batch)[:, None, None, None], indices, jnp.arange(kv_heads)[None, :, None, None]
    read_keys, read_values = (held[place].astype(jnp.float32) for held in (layer.keys, layer.values))
    logits = jnp.einsum("bkgd,bkgnd->bkgn", grouped.astype(jnp.float32), read_keys, precision="highest")
    logits = jnp.where(is_real, logits * head_dim**-0.5, MASKED)
    highest = lax.pmax(logits.max(axis=-1), axis)
    weights = jnp.where(is_real, jnp.exp(logits - highest[..., None]), 0.0)
    mixed = jnp.einsum("bkgn,bkgnd->bkgd", weights, read_values, precision="highest")
    mixed, total = lax.psum((mixed, weights.sum(axis=-1)), axis)
    out = mixed / total[..., None]
    if layer.moments is not None:
        whole, of_values = query_moments(layer.moments, grouped)
        at = first + indices
        is_counted = is_real & (at > 0) & (at < block_start(lengths)[:, None, None, None])
        x = jnp.where(is_counted, logits - whole.mean[..., None], 0.0)
        read = lax.psum([rows.sum(axis=-1) for rows in (is_counted.astype(x.dtype), x, x * x)], axis)
        corrections = selector.tail.grouped(kv_heads)
        log_mass, value = estimate(whole, take_off(whole, *read), of_values, highest, corrections)
        out, _ = join(out, highest + jnp.log(total), value, log_mass)
    return out.reshape(batch, 1, q_heads, head_dim).astype(queries.dtype), layer


def attend_all_split(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    layer: LayerCache,
    selector: LayerSelector | None,
    starts: Int32[Array, "batch"],
    ends: Int32[Array, "batch"] | None = None,
    axis: str = "context",
) -> tuple[Float[Array, "batch q_len q_heads head_dim"], LayerCache]:
    """Return what `cached_attention.attend_chunk` and `attend_densely` do, from this device's part of the cache.

    Args:
        queries: of the new tokens, the same on all devices of the axis; so are keys, values and starts.
        layer: this device's slots; moments are of all, the same on all devices.
        selector: writes codes of the new tokens; None where the layer keeps none.
        starts: tokens each sequence has cached before.
        ends: tokens of each sequence with those of a chunk, its padding apart, which moments are then folded to; None:
            of a step, which `fold_split` does.
        axis: of the mesh, over which slots are split.
    """
    layer, q_len = _append_own(layer, keys, values, starts, selector, axis), queries.shape[1]
    if ends is not None and selector is not None and layer.moments is not None:
        filled = jnp.clip(ends, starts, starts + q_len)
        layer = dataclasses.replace(layer, moments=fold_split(layer, starts, filled, q_len, axis))
    return read_all_split(queries, layer, starts, axis), layer


def read_all_split(
    queries: Float[Array, "batch q_len q_heads head_dim"],
    layer: LayerCache,
    starts: Int32[Array, "batch"],
    axis: str = "context",
) -> Float[Array, "batch q_len q_heads head_dim"]:
    """Return causal attention to a cache that holds the new tokens, from this device's part of it.

    Softmax is built up block by block over the filled slots that are this device's, and joined over the devices.
    Args as `attend_all_split`.
    """
    batch, q_len, q_heads, head_dim = queries.shape
    slots, kv_heads = layer.keys.shape[1:3]
    first, block = lax.axis_index(axis) * slots, min(BLOCK, slots)
    scaled = queries * jnp.asarray(head_dim**-0.5, queries.dtype)
    grouped = scaled.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    rows = starts[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None, :]

    def add_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total, acc = carry
        at = jnp.minimum(index * block, slots - block)  # the last block may overlap the one before it
        own_keys, own_values = (lax.dynamic_slice_in_dim(held, at, block, 1) for held in (layer.keys, layer.values))
        places = at + jnp.arange(block, dtype=jnp.int32)[None, None, :]
        visible = (first + places <= rows[:, :, None]) & (places >= index * block)
        logits = jnp.einsum("bkgtd,bskd->bkgts", grouped, own_keys, preferred_element_type=jnp.float32)
        logits = jnp.where(visible[:, None, None], logits, MASKED)
        raised = jnp.maximum(m, logits.max(axis=-1))
        p, alpha = jnp.exp(logits - raised[..., None]), jnp.exp(m - raised)
        mixed = jnp.einsum(
            "bkgts,bskd->bkgtd", p.astype(own_values.dtype), own_values, preferred_element_type=jnp.float32
        )
        return raised, total * alpha + p.sum(axis=-1), acc * alpha[..., None] + mixed

    filled = jnp.clip(jnp.max(starts) + q_len - first, 0, slots)
    shape = grouped.shape[:-1]
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape))
    m, total, acc = lax.fori_loop(0, (filled + block - 1) // block, add_block, start)
    share = jnp.exp(m - lax.pmax(m, axis))  # 0 where a query sees nothing of what lies here
    total, acc = lax.psum((total * share, acc * share[..., None]), axis)
    out = (acc / total[..., None]).transpose(0, 3, 1, 2, 4)
    return out.reshape(queries.shape).astype(queries.dtype)


def fold_split(
    layer: LayerCache,
    starts: Int32[Array, "batch"],
    ends: Int32[Array, "batch"],
    tokens: int = 1,
    axis: str = "context",
) -> Moments:
    """Return what `moments.fold` does, from this device's part of the cache: the very numbers, on all devices.

    Each device gives its own slots of the blocks that became full, and zeros elsewhere; their sum is those blocks.

    Args:
        layer: this device's slots, and moments of what `starts` tokens filled.
        starts: lengths before.
        ends: lengths after; no less, and at most `tokens` more.
        tokens: the most that are new.
        axis: of the mesh, over which slots are split.
    """
    assert layer.moments is not None, "a layer without moments folds nothing"
    slots = layer.keys.shape[1]
    positions, is_new = new_blocks(starts, ends, tokens, slots * int(lax.psum(1, axis)))
    own = positions - lax.axis_index(axis) * slots
    is_own, at = (own >= 0) & (own < slots), jnp.clip(own, 0, slots - 1)

    def gather(held: Array) -> Array:
        rows = jnp.take_along_axis(held, at[..., None, None], axis=1)
        return lax.psum(jnp.where(is_own[..., None, None], rows, jnp.zeros((), held.dtype)), axis)

    return add_tokens(layer.moments, gather(layer.keys), gather(layer.values), is_new)


def select_split(
    scores: Int32[Array, "batch heads slots"],
    ends: Int32[Array, "batch"],
    budgets: Int32[Array, "batch"],
    first: Int32[Array, ""],
    selection: SelectionConfig,
    score_range: tuple[int, int],
    axis: str,
) -> Bool[Array, "batch heads slots"]:
    """Return which of this device's slots are among those that `selector.selection.select_tokens` chooses of all.

    Args:
        scores: of this device's slots.
        ends: tokens of each sequence on all devices, the newest included.
        budgets: tokens that each sequence reads of all devices.
        first: position of this device's first slot.
        selection: which tokens are always read.
        score_range: least and greatest score.
        axis: of the mesh, over which slots are split.
    """
    least, greatest = score_range
    always = greatest - least + 2
    positions = first + jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None, :]
    ranks = (scores - least + 1).astype(jnp.uint32)
    ranks = jnp.where(positions < selection.sink_tokens, jnp.uint32(always), ranks)
    own_ends = jnp.broadcast_to((ends - first)[:, None], scores.shape[:2])
    ranks = force_ranks(ranks, own_ends, always, 0, max(selection.recent_tokens, 1))
    rows = jnp.broadcast_to(budgets[:, None], scores.shape[:2])
    threshold, left = _find_cut(ranks, rows, always.bit_length(), axis)
    ties = ranks == threshold[..., None]
    own = ties.sum(axis=-1, dtype=jnp.int32)
    counts = lax.all_gather(own, axis)  # [devices, batch, heads]
    is_later = jnp.arange(counts.shape[0])[:, None, None] > lax.axis_index(axis)
    taken = jnp.clip(left - jnp.sum(jnp.where(is_later, counts, 0), axis=0), 0, own)
    from_newest = own[..., None] - jnp.cumsum(ties, axis=-1, dtype=jnp.int32)  # ties after each
    return (ranks > threshold[..., None]) | (ties & (from_newest < taken[..., None]))


def _find_cut(
    ranks: UInt32[Array, "batch heads slots"], budgets: Int32[Array, "batch heads"], rank_bits: int, axis: str
) -> tuple[UInt32[Array, "batch heads"], Int32[Array, "batch heads"]]:
    """Return the rank of the last token chosen on any device, and how many tokens of that rank are."""
    batch, heads, _ = ranks.shape
    threshold, left = jnp.zeros(budgets.shape, jnp.uint32), budgets
    row = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    for done in reversed(range(-(-rank_bits // DIGIT_BITS))):
        shift = done * DIGIT_BITS
        digits = ranks >> shift  # with all digits above, of which those found so far are the threshold's
        is_open = (digits >> DIGIT_BITS) == (threshold >> shift >> DIGIT_BITS)[..., None]
        bins = (digits & jnp.uint32(2**DIGIT_BITS - 1)).astype(jnp.int32)
        histogram = jnp.zeros((batch, heads, 2**DIGIT_BITS), jnp.int32).at[(*row, bins)].add(is_open.astype(jnp.int32))
        reach = jnp.cumsum(lax.psum(histogram, axis)[..., ::-1], axis=-1)[..., ::-1]  # ranks of each bin and above
        found = jnp.maximum(jnp.sum(reach >= left[..., None], axis=-1, dtype=jnp.int32) - 1, 0)
        above = jnp.take_along_axis(jnp.pad(reach, [(0, 0), (0, 0), (0, 1)]), found[..., None] + 1, axis=-1)[..., 0]
        threshold, left = threshold | (found.astype(jnp.uint32) << shift), left - above
    return jnp.maximum(threshold, 1), left


def _compact(
    mask: Bool[Array, "batch heads slots"], width: int
) -> tuple[Int32[Array, "batch heads width"], Bool[Array, "batch heads width"]]:
    """Return the first `width` places that a mask holds, ascending, and which are real."""
    places = jax.vmap(jax.vmap(lambda row: jnp.nonzero(row, size=width, fill_value=0)[0]))(mask)
    is_real = jnp.arange(width)[None, None, :] < mask.sum(axis=-1)[..., None]
    return places.astype(jnp.int32), is_real


def _append_own(
    layer: LayerCache,
    keys: Float[Array, "batch q_len kv_heads head_dim"],
    values: Float[Array, "batch q_len kv_heads head_dim"],
    starts: Int32[Array, "batch"],
    selector: LayerSelector | None,
    axis: str,
) -> LayerCache:
    """Return the layer with those of the new tokens whose slots are this device's.

    Args:
        starts: tokens each sequence has cached before, on all devices.
        selector: None leaves codes as they are.
    """
    slots, q_len = layer.keys.shape[1], keys.shape[1]
    own = starts - lax.axis_index(axis) * slots  # where the first of them would lie
    width = min(q_len, slots)
    at = jnp.clip(own, 0, slots - width)
    token = (at - own)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]  # that belongs in each slot from `at` on
    is_new = (token >= 0) & (token < q_len)
    token = jnp.clip(token, 0, q_len - 1)

    def choose(new: Array, held: Array, place: int) -> Array:
        shape = [len(starts), *[1] * (new.ndim - 1)]
        shape[place] = width
        moved = jnp.take_along_axis(new, token.reshape(shape), axis=place)
        old = jax.vmap(lambda row, first: lax.dynamic_slice_in_dim(row, first, width, place - 1))(held, at)
        return jnp.where(is_new.reshape(shape), moved.astype(old.dtype), old)

    codes = None
    if selector is not None and layer.codes is not None:
        codes = choose(selector.key_codes(keys), layer.codes, 3)
    return append(layer, choose(keys, layer.keys, 1), choose(values, layer.values, 1), codes, at)
