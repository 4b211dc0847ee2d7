"""Prefill and decoding on the device: laws that hold whatever the weights are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax import decode_step as step_module
from spotlight_jax.attention import selected_attention
from spotlight_jax.cache import bucket_length
from spotlight_jax.config.generation import DecodeConfig, RowConfig
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.decode_step import decode_step
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import RopeConfig
from spotlight_jax.models.decoder import apply_layer, embed_tokens, init_params, unembed
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import forward
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.scoring import hash_score_range, hash_scores
from spotlight_jax.selector.selection import select_mask
from tests.hash_params import draw_params
from tests.tolerances import tolerance

MODEL = dataclasses.replace(PRESETS["tiny"], layers=2)  # one that may be dense, one that is sparse
HASHES = {
    "transform": TransformConfig(code_bits=64),
    "asymmetric": NetworkConfig("asymmetric", code_bits=64, hidden=24),
    "paper": NetworkConfig(form="symmetric", skip="none", code_bits=32, hidden=24, code_heads="query", centre=False),
    "signs per KV head": NetworkConfig(form="symmetric", code_bits=64, hidden=24),
}
ALWAYS_SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))


@functools.cache
def model_params():
    return init_params(jax.random.key(0), MODEL)


@functools.cache
def selector(name="transform"):
    cfg = HASHES[name]
    shape = HeadShape(MODEL.layers, MODEL.q_heads, MODEL.kv_heads, MODEL.head_dim)
    return Selector(shape, draw_params(cfg, shape), "tiny", {})


@functools.cache  # tests that need the same engine share what it compiled, so most prompts go in chunks of one length
def make_engine(name=None, prefill_chunk=32, **fields):
    cfg = DecodeConfig(prefill_chunk=prefill_chunk, **fields)
    return Engine(MODEL, model_params(), name and selector(name), cfg)


def draw_prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, MODEL.vocab, length).tolist()


def run(engine, prompts, new, limit=None, rows=None):
    """Tokens chosen after each prompt, first one included."""
    state = engine.prefill(prompts, new, rows=rows)
    chosen = [np.asarray(state.tokens)[:, None]]
    while not np.asarray(state.is_done).all():
        state, tokens = engine.decode(state, limit)
        chosen.append(tokens)
    return np.concatenate(chosen, axis=1)[:, :new], state


def greedy_by_forward(prompt, new):
    """No cache: the whole sequence anew for each token."""
    tokens = list(prompt)
    for _ in range(new):
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])  # one shape; later tokens are never seen
        tokens.append(int(jnp.argmax(forward(model_params(), padded, MODEL)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_decoding_equals_a_forward_pass_per_token():
    prompt = draw_prompt(37)
    tokens, _ = run(make_engine(), [prompt], 12)
    assert tokens[0].tolist() == greedy_by_forward(prompt, 12)


def logits_after(engine, prompt, mode):
    """Logits of one decoding step that feeds the prompt's last token."""
    state = engine.prefill([prompt[:-1]], 2)
    step = jax.jit(decode_step, static_argnums=(5, 6, 7))
    args = (engine.params, engine.selectors(np.zeros(1, int)), state.cache, jnp.asarray(prompt[-1:]), state.rope_len)
    logits, _ = step(*args, MODEL, engine.cfg, mode)
    return np.asarray(logits[0])


def test_prefill_then_one_step_equals_one_forward_pass():
    prompt = draw_prompt(50)
    expected = forward(model_params(), jnp.asarray([prompt]), MODEL)[0, -1]
    np.testing.assert_allclose(logits_after(make_engine(), prompt, "dense"), expected, rtol=1e-4, atol=1e-4)


def test_a_row_that_nobody_reads_changes_nothing(monkeypatch):
    """What GPUs do for a single sequence, here: the same logits and the same cache."""
    engine = make_engine("transform", selection=SelectionConfig(keep=0.3, min_context=0, dense_layers=(0,)))
    prompt = draw_prompt(50)
    state = engine.prefill([prompt], 2)
    args = engine.params, engine.selectors(np.zeros(1, int)), state.cache, jnp.asarray([3]), state.rope_len

    def step():
        return jax.jit(lambda *args: decode_step(*args, MODEL, engine.cfg, "sparse"))(*args)

    logits, cache = step()
    rows = []
    monkeypatch.setattr(step_module, "rows_of_step", lambda batch: rows.append(batch) or 2)
    filled_logits, filled_cache = step()
    assert rows == [1] and filled_logits.shape == logits.shape
    np.testing.assert_allclose(filled_logits, logits, rtol=1e-5, atol=1e-5)
    for found, expected in zip(jax.tree.leaves(filled_cache), jax.tree.leaves(cache), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "per"),
    [("transform", "kv_head"), ("asymmetric", "kv_head"), ("paper", "query_head"), ("signs per KV head", "query_head")],
)
def test_keeping_everything_equals_dense(name, per):
    prompt = draw_prompt(50)
    selection = SelectionConfig(keep=1.0, min_context=0, dense_layers=(), per=per)
    sparse = logits_after(make_engine(name, selection=selection), prompt, "sparse")
    dense = logits_after(make_engine(), prompt, "dense")
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_stepwise_decoding_selects_what_teacher_forcing_selects(name, per):
    """Logits of every step of a sparse decode equal those of one sparse pass over the whole text."""
    text = draw_prompt(60, seed=3)
    selection = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,), per=per, sink_tokens=1)
    engine = make_engine(name, selection=selection)
    is_group = per == "kv_head"

    def attend_forced(queries, keys, values, layer):
        params = selector(name).params.layer(layer)
        codes = params.key_codes(keys)
        score_range = hash_score_range(params, MODEL.group, is_group)

        def select(rows, positions):
            scores = hash_scores(params, rows, codes, is_group)
            return select_mask(scores, positions, selection, score_range), None, ()

        return selected_attention(queries, keys, values, select)[0]

    @jax.jit
    def logits_forced(params, tokens):
        positions = jnp.arange(len(text), dtype=jnp.int32)[None]
        x = embed_tokens(params, tokens, MODEL)
        x, _ = apply_layer(params["layer_0"], x, positions, attend_to_all, MODEL)
        for layer in range(1, MODEL.layers):
            attend = functools.partial(lambda q, k, v, layer: (attend_forced(q, k, v, layer), None), layer=layer)
            x, _ = apply_layer(params[f"layer_{layer}"], x, positions, attend, MODEL)
        return unembed(params, x, MODEL)

    forced = np.asarray(logits_forced(model_params(), jnp.asarray([text])))[0]

    cache = engine.empty_cache(1, 256)
    step = jax.jit(decode_step, static_argnums=(5, 6, 7))
    for place, token in enumerate(text):
        args = (engine.params, engine.selectors(np.zeros(1, int)), cache, jnp.asarray([token]), jnp.full((1,), 256))
        logits, cache = step(*args, MODEL, engine.cfg, "sparse")
        cache = cache.replace(lengths=cache.lengths + 1)
        np.testing.assert_allclose(logits[0], forced[place], rtol=1e-3, atol=1e-3)


def attend_to_all(queries, keys, values):
    def select(rows, positions):
        visible = jnp.arange(keys.shape[1])[None, None, :] <= positions[:, :, None]
        return jnp.broadcast_to(visible[:, :, None], (*rows.shape[:3], keys.shape[1])), None, ()

    return selected_attention(queries, keys, values, select)[0], None


@pytest.mark.parametrize("chosen", [None, "transform"])
def test_a_prompt_in_chunks_equals_a_prompt_at_once(chosen):
    prompt = draw_prompt(75)
    whole, at_once = run(make_engine(chosen, selection=ALWAYS_SPARSE, prefill_chunk=128), [prompt], 8)
    pieces, chunked = run(make_engine(chosen, selection=ALWAYS_SPARSE), [prompt], 8)
    np.testing.assert_array_equal(whole, pieces)
    for one, other in zip(at_once.cache.layers, chunked.cache.layers, strict=True):
        np.testing.assert_allclose(one.keys[:, :75], other.keys[:, :75], **tolerance("float32"))
        if chosen and one.codes is not None:
            np.testing.assert_array_equal(one.codes[..., :75], other.codes[..., :75])


@pytest.mark.parametrize("chosen", [None, "transform", "paper"])
def test_a_sequence_alone_equals_the_same_in_a_ragged_batch(chosen):
    prompts = [draw_prompt(length, seed=length) for length in (9, 70, 33)]
    engine = make_engine(chosen, selection=ALWAYS_SPARSE)
    together, _ = run(engine, prompts, 10)
    for row, prompt in enumerate(prompts):
        alone, _ = run(engine, [prompt], 10)
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("chosen", [None, "transform"])
@pytest.mark.slow
def test_dynamic_scaling_adapts_to_each_sequence_of_a_ragged_batch(chosen):
    """Past the trained length, short of it, and across it while decoding."""
    model = dataclasses.replace(MODEL, rope=RopeConfig("dynamic", factor=4.0, trained_len=24))
    cfg = DecodeConfig(prefill_chunk=32, selection=ALWAYS_SPARSE)
    engine = Engine(model, model_params(), chosen and selector(chosen), cfg)
    prompts = [draw_prompt(length, seed=length) for length in (9, 70, 20)]
    together = engine.prefill(prompts, 10)
    np.testing.assert_array_equal(together.rope_len, [19, 80, 30])
    tokens, _ = run(engine, prompts, 10)
    for row, prompt in enumerate(prompts):
        alone = engine.prefill([prompt], 10)
        for ragged, single in zip(together.cache.layers, alone.cache.layers, strict=True):
            keys = ragged.keys[row, : len(prompt)], single.keys[0, : len(prompt)]
            np.testing.assert_allclose(*keys, **tolerance("float32"))
        assert tokens[row].tolist() == run(engine, [prompt], 10)[0][0].tolist()


@pytest.mark.slow
def test_a_batch_that_straddles_the_crossover_reads_each_sequence_its_own_way():
    prompts = [draw_prompt(length, seed=length) for length in (20, 60)]
    selection = SelectionConfig(keep=0.2, min_tokens=5, min_context=40, dense_layers=(0,))
    engine = make_engine("transform", selection=selection, block=64)
    together, _ = run(engine, prompts, 30)
    assert {key[1] for key in engine.programs if key[0] == "decode"} == {"mixed", "sparse"}
    for row, prompt in enumerate(prompts):
        alone, _ = run(engine, [prompt], 30)
        assert together[row].tolist() == alone[0].tolist()


def test_below_the_crossover_a_step_is_dense():
    prompt = draw_prompt(30)
    selection = SelectionConfig(keep=0.2, min_tokens=5, min_context=200, dense_layers=(0,))
    tokens, _ = run(make_engine("transform", selection=selection), [prompt], 10)
    assert tokens[0].tolist() == greedy_by_forward(prompt, 10)


@pytest.mark.parametrize("chosen", [None, "transform"])
@pytest.mark.parametrize("batch", [1, 3])
def test_poisoned_slots_past_each_length_never_reach_the_output(chosen, batch):
    prompts = [draw_prompt(40 - 9 * row, seed=row) for row in range(batch)]
    engine = make_engine(chosen, selection=ALWAYS_SPARSE)
    clean, _ = engine.decode(engine.prefill(prompts, 8))
    state = engine.prefill(prompts, 8)

    def poison(layer):
        unfilled = jnp.arange(state.cache.max_len)[None, :] >= state.cache.lengths[:, None]
        rows = unfilled[:, :, None, None]
        codes = layer.codes
        if codes is not None:
            codes = jnp.where(unfilled[:, None, None, :], jnp.uint32(0xFFFFFFFF), codes)
        return layer.replace(
            keys=jnp.where(rows, 1e6, layer.keys), values=jnp.where(rows, -1e30, layer.values), codes=codes
        )

    cache = dataclasses.replace(state.cache, layers=tuple(poison(layer) for layer in state.cache.layers))
    poisoned, _ = engine.decode(state.replace(cache=cache))
    np.testing.assert_array_equal(clean.tokens, poisoned.tokens)
    for one, other in zip(clean.cache.layers, poisoned.cache.layers, strict=True):
        last = int(clean.cache.lengths[0])
        np.testing.assert_array_equal(one.keys[0, :last], other.keys[0, :last])


@pytest.mark.parametrize("chosen", [None, "transform"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_of_steps_never_copies_the_cache(chosen, batch):
    """The program takes over the cache's buffers, and needs less workspace than one layer's keys."""
    engine = make_engine(chosen, selection=ALWAYS_SPARSE, block=4)
    state = engine.empty_state(batch, 32768)
    state = dataclasses.replace(state, is_done=jnp.zeros(batch, bool), left=jnp.full(batch, 4, jnp.int32))
    cache = state.cache
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    layer_bytes = cache.layers[0].keys.nbytes
    state_shape = (cache.layers[0].keys.shape, "float32")
    engine.decode(state)
    (memory,) = [program.memory_analysis() for key, program in engine.programs.items() if state_shape in key[3]]
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < layer_bytes


def test_decoding_compiles_once_while_the_cache_grows():
    engine = make_engine("transform", selection=ALWAYS_SPARSE, block=5)
    run(engine, [draw_prompt(30)], 60)
    assert sum(key[0] == "decode" for key in engine.programs) == 1
    run(engine, [draw_prompt(41, seed=5)], 60)  # another prompt, the same bucket
    assert sum(key[0] == "decode" for key in engine.programs) == 1


@pytest.mark.slow
def test_block_length_does_not_change_the_tokens():
    prompt = draw_prompt(30)
    rows = [RowConfig(SamplingConfig(temperature=0.8, top_k=50, top_p=0.9, seed=7))]
    one, _ = run(make_engine("transform", selection=ALWAYS_SPARSE, block=32), [prompt], 20, rows=rows)
    other, _ = run(make_engine("transform", selection=ALWAYS_SPARSE, block=3), [prompt], 20, limit=2, rows=rows)
    np.testing.assert_array_equal(one, other)


def test_a_stop_token_ends_its_own_sequence_only():
    prompts = [draw_prompt(20, seed=1), draw_prompt(26, seed=2)]
    free, _ = run(make_engine(), prompts, 16)
    stop = int(free[0, 5])
    tokens, state = run(make_engine(), prompts, 16, rows=[RowConfig(stop_tokens=(stop,))] * 2)
    ends = [row.tolist().index(stop) + 1 if stop in row else 16 for row in free]
    for row in range(2):
        assert tokens[row, : ends[row]].tolist() == free[row, : ends[row]].tolist()
    # every chosen token but the last is cached
    assert np.asarray(state.cache.lengths).tolist() == [20 + ends[0] - 1, 26 + ends[1] - 1]


# Slots


MIXED = [
    RowConfig(),
    RowConfig(SamplingConfig(0.9, seed=5)),
    RowConfig(SamplingConfig(1.2, top_k=20, top_p=0.9, seed=2), number=3),
]


def collect(engine, state, slots, texts):
    """One block; what each sequence in a slot gets goes to its text."""
    is_done = np.asarray(state.is_done)
    state, tokens = engine.decode(state, 4)
    for slot, name in slots.items():
        if not is_done[slot]:
            texts[name] += tokens[slot].tolist()
    return state


@pytest.mark.parametrize("chosen", [None, "transform"])
def test_sequences_that_come_and_go_get_the_texts_they_get_alone(chosen):
    """Other prompts, settings and lengths, in slots of a batch that others join and leave."""
    engine = make_engine(chosen, selection=ALWAYS_SPARSE)
    lengths, new = [33, 70, 12, 51, 20], [12, 30, 17, 9, 21]
    prompts = [draw_prompt(length, seed=length) for length in lengths]
    rows = [MIXED[number % 3] for number in range(5)]
    wanted = [
        run(engine, [prompt], count, rows=[row])[0][0] for prompt, count, row in zip(prompts, new, rows, strict=True)
    ]
    state, slots, texts, waiting = engine.empty_state(3, 256), {}, {}, list(range(5))
    while waiting or slots:
        for slot in [slot for slot in range(3) if slot not in slots][: len(waiting)]:
            name = waiting.pop(0)
            alone = engine.prefill([prompts[name]], new[name], rows=[rows[name]])
            state, slots[slot], texts[name] = engine.insert(state, slot, alone), name, [int(alone.tokens[0])]
        state = collect(engine, state, slots, texts)
        ended = [slot for slot in slots if np.asarray(state.is_done)[slot]]
        state = engine.free(state, ended)
        for slot in ended:
            del slots[slot]
    for name in range(5):
        assert texts[name][: new[name]] == wanted[name].tolist()
    assert np.asarray(state.cache.lengths).tolist() == [0, 0, 0]


def test_settings_of_sequences_compile_nothing_anew():
    engine = Engine(MODEL, model_params(), None, DecodeConfig(prefill_chunk=32))
    prompts = [draw_prompt(20, seed=1), draw_prompt(26, seed=2)]
    counts = []
    for rows in (None, MIXED[:2], [RowConfig(stop_tokens=(1, 2, 3)), MIXED[2]]):
        run(engine, prompts, 8, rows=rows)
        counts.append(len(engine.programs))
    assert len(set(counts)) == 1


def test_a_sequence_that_is_longer_than_a_batchs_slots_is_refused():
    engine = make_engine()
    alone = engine.prefill([draw_prompt(300)], 8)
    with pytest.raises(InputError, match="does not fit a batch of 256"):
        engine.insert(engine.empty_state(2, 256), 0, alone)


def test_more_stop_tokens_than_a_step_looks_for_are_refused():
    with pytest.raises(InputError, match="33 tokens end a text; give at most 32"):
        RowConfig(stop_tokens=tuple(range(33)))


def test_a_second_turn_equals_one_long_prompt():
    first, second = draw_prompt(40, seed=1), draw_prompt(230, seed=2)  # the second needs a larger cache
    engine = make_engine("transform", selection=ALWAYS_SPARSE)
    state = engine.prefill([first], 1)
    state = engine.prefill([second], 8, state.cache)
    tokens = [int(state.tokens[0])]
    state, more = engine.decode(state)
    whole, _ = run(engine, [first + second], 8)
    assert [*tokens, *more[0].tolist()] == whole[0].tolist()


# Sets of hash functions by length

SHORT = 60  # tokens of the longest sequence that the first set is for


@functools.cache
def by_length(name):
    """A selector of two sets, and the selectors that hold one of them each."""
    cfg, long = HASHES[name], selector(name)
    short = draw_params(cfg, long.shape, seed=7)
    both = dataclasses.replace(long, positions=100, shorter=((SHORT, short),))
    engines = [
        Engine(MODEL, model_params(), one, DecodeConfig(prefill_chunk=32, selection=ALWAYS_SPARSE))
        for one in (both, dataclasses.replace(long, params=short), long)
    ]
    return engines


@pytest.mark.parametrize(("length", "own"), [(SHORT - 20, 1), (SHORT - 19, 2)])
def test_a_sequence_is_coded_by_the_set_for_its_final_length(length, own):
    engines = by_length("transform")
    prompt = draw_prompt(length)
    (tokens, state), (wanted, other) = (run(engines[which], [prompt], 20) for which in (0, own))
    np.testing.assert_array_equal(tokens, wanted)
    for layer, same in zip(state.cache.layers[1:], other.cache.layers[1:], strict=True):
        np.testing.assert_array_equal(layer.codes, same.codes)
    unlike, _ = run(engines[3 - own], [prompt], 20)
    assert not np.array_equal(tokens, unlike)  # else the two sets show nothing


def test_sequences_of_other_sets_share_their_programs():
    engine = Engine(MODEL, model_params(), by_length("transform")[0].selector, DecodeConfig(selection=ALWAYS_SPARSE))
    counts = []
    for length in (SHORT - 20, SHORT - 19):
        run(engine, [draw_prompt(length)], 20)
        counts.append(len(engine.programs))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["transform", "asymmetric", "paper"])
def test_each_sequence_of_a_batch_is_coded_by_its_own_set(name):
    engine = by_length(name)[0]
    prompts = [draw_prompt(length, seed=length) for length in (SHORT, 25)]
    together, _ = run(engine, prompts, 20)
    for row, prompt in enumerate(prompts):
        alone, _ = run(engine, [prompt], 20)
        assert together[row].tolist() == alone[0].tolist()


def test_a_talk_that_outgrows_a_set_goes_on_with_codes_of_the_next():
    engine = by_length("transform")[0]
    turn, more = draw_prompt(30), draw_prompt(25, seed=3)
    state = engine.prefill([turn], 2)
    assert np.asarray(state.cache.code_sets).tolist() == [0]
    grown = engine.prefill([more], 20, state.cache)
    whole = engine.prefill([turn + more], 20)
    assert np.asarray(grown.cache.code_sets).tolist() == np.asarray(whole.cache.code_sets).tolist() == [1]
    for layer, same in zip(grown.cache.layers[1:], whole.cache.layers[1:], strict=True):
        filled = len(turn + more)
        unequal = np.asarray(layer.codes)[..., :filled] != np.asarray(same.codes)[..., :filled]
        assert unequal.mean() < 0.01  # keys of other chunks differ in their last bits
    assert engine.decode(grown)[1].tolist() == engine.decode(whole)[1].tolist()


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="empty"):
        make_engine().prefill([[1, 2], []], 4)
    with pytest.raises(InputError, match="empty"):
        make_engine().prefill([], 4)


@pytest.mark.parametrize("tokens", [1, 256, 257, 1000, 7628, 8192, 8193, 131072, 131073])
def test_buckets_hold_their_tokens_and_waste_at_most_a_quarter(tokens):
    length = bucket_length(tokens)
    assert length >= tokens and length % 128 == 0
    assert length <= max(256, tokens * 1.25 + 128)
    assert bucket_length(length) == length
