"""Texts from prompts, with a tiny model whose tokens are bytes."""

import dataclasses
import functools

import jax
import pytest

from spotlight_jax.config.generation import GenerateConfig, make_decode_config
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import Run, encode_prompts, generate, head_shape, make_engine, stream
from spotlight_jax.models.config import RopeConfig
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.token_ids import encode_chat
from tests.byte_tokenizer import byte_tokenizer

MODEL = PRESETS["tiny"]
SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))


TOKENIZER = byte_tokenizer()


@functools.cache
def base_model(tokenizer=TOKENIZER):
    return BaseModel(MODEL, init_params(jax.random.key(0), MODEL), tokenizer, "tiny")


@functools.cache
def selector():
    cfg, shape = TransformConfig(code_bits=64), head_shape(MODEL)
    return Selector(shape, init_functions(jax.random.key(1), cfg, shape), "tiny", {})


def engine(cfg, is_sparse):
    """What a text ends with and how tokens are drawn compiles nothing: engines that decode alike are one."""
    return engine_of(make_decode_config(cfg), is_sparse)


@functools.cache
def engine_of(cfg, is_sparse):
    model = base_model()
    return Engine(model.cfg, model.params, selector() if is_sparse else None, cfg)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_streamed_pieces_are_the_generated_text(is_sparse):
    cfg = GenerateConfig(max_new_tokens=30, selection=SPARSE, sampling=SamplingConfig(temperature=1.0, seed=2))
    compiled = engine(cfg, is_sparse)
    (result,) = generate(base_model(), ["Hello, world"], cfg, engine=compiled)
    pieces = list(stream(base_model(), "Hello, world", cfg, engine=compiled))
    assert "".join(pieces) == result.text and len(pieces) > 1
    assert result.prompt_tokens == 12 and result.ended_by in ("length", "end of text")
    assert result.text == TOKENIZER.decode(result.tokens, skip_special_tokens=True)


@pytest.mark.slow
def test_prompts_of_one_batch_do_not_change_each_other():
    cfg = GenerateConfig(max_new_tokens=12, selection=SPARSE)
    prompts = ["short", "a much longer prompt, so that the batch is ragged " * 2]
    together = generate(base_model(), prompts, cfg, engine=engine(cfg, True))
    alone = [generate(base_model(), [prompt], cfg, engine=engine(cfg, True))[0] for prompt in prompts]
    assert together == alone


def free_text(cfg):
    return generate(base_model(), ["abc"], cfg, engine=engine(cfg, False))[0]


def test_a_stop_string_ends_the_text_before_it():
    cfg = GenerateConfig(max_new_tokens=40, sampling=SamplingConfig(temperature=2.0, seed=5))
    text = free_text(cfg).text
    stop = text[len(text) // 2 :][:3]
    stopping = GenerateConfig(max_new_tokens=40, sampling=cfg.sampling, stop=(stop,))
    result = generate(base_model(), ["abc"], stopping, engine=engine(stopping, False))[0]
    assert result.ended_by == "stop string" and result.text == text[: text.index(stop)]


def test_a_stop_string_never_met_changes_nothing():
    cfg = GenerateConfig(max_new_tokens=20)
    never = GenerateConfig(max_new_tokens=20, stop=("no such text anywhere",))
    assert generate(base_model(), ["abc"], never, engine=engine(never, False))[0] == free_text(cfg)


def test_the_end_of_text_token_ends_one_sequence_unless_ignored():
    free = free_text(GenerateConfig(max_new_tokens=20))
    end = next(token for token in free.tokens[4:] if token < 256)
    model = base_model(byte_tokenizer(end))
    first = free.tokens.index(end)
    cfg = GenerateConfig(max_new_tokens=20)
    result = generate(model, ["abc"], cfg)[0]
    assert result.tokens == free.tokens[: first + 1] and result.ended_by == "end of text"
    ignoring = GenerateConfig(max_new_tokens=20, ignore_eos=True)
    assert generate(model, ["abc"], ignoring)[0].tokens == free.tokens


def test_an_id_of_the_models_own_files_ends_a_text():
    free = free_text(GenerateConfig(max_new_tokens=20))
    end = free.tokens[5]
    model = dataclasses.replace(base_model(), cfg=dataclasses.replace(MODEL, stop_tokens=(end,)))
    result = generate(model, ["abc"], GenerateConfig(max_new_tokens=20))[0]
    assert result.tokens == free.tokens[: free.tokens.index(end) + 1] and result.ended_by == "end of text"


def test_a_stop_string_that_is_a_special_token_ends_the_text_there():
    free = free_text(GenerateConfig(max_new_tokens=20))
    end = next(token for token in free.tokens[4:] if token < 256)
    name = TOKENIZER.convert_ids_to_tokens(end)
    model = base_model(byte_tokenizer(end))  # its end of text, which --ignore-eos leaves out
    cfg = GenerateConfig(max_new_tokens=20, ignore_eos=True, stop=(name,))
    result = generate(model, ["abc"], cfg)[0]
    assert result.tokens == free.tokens[: free.tokens.index(end) + 1] and result.ended_by == "stop string"


def test_a_stop_string_that_no_text_can_hold_is_said():
    cfg = GenerateConfig(max_new_tokens=1, stop=("<end>\n",))
    with pytest.warns(UserWarning, match=r"'<end>\\n' can never match"):
        generate(base_model(), ["abc"], cfg, engine=engine(GenerateConfig(max_new_tokens=1), False))


@pytest.mark.parametrize(
    ("stop", "message"),
    [("abc", "stop is 'abc'; give strings in a list"), ((3,), "stop is"), (("",), "empty"), (("\udc80",), "Unicode")],
)
def test_a_stop_that_is_no_list_of_strings_is_refused(stop, message):
    cfg = GenerateConfig()
    object.__setattr__(cfg, "stop", stop)  # tests check types where a class is called, users' programs do not
    with pytest.raises(InputError, match=message):
        cfg.__post_init__()


@pytest.mark.parametrize("broken", ["norm", "layer_1"])
def test_a_model_whose_logits_are_nan_is_an_error_and_no_blank_text(broken):
    params = {
        **base_model().params,
        broken: jax.tree.map(lambda leaf: leaf * jax.numpy.nan, base_model().params[broken]),
    }
    with pytest.raises(InputError, match=r"logits are not finite"):
        generate(dataclasses.replace(base_model(), params=params), ["abc"], GenerateConfig(max_new_tokens=3))


def test_logits_that_become_nan_while_decoding_are_an_error():
    cfg = GenerateConfig(max_new_tokens=12)
    compiled = make_engine(base_model(), cfg)
    state = compiled.prefill([[97, 98, 99]], 12)
    compiled.params = jax.tree.map(lambda leaf: leaf * jax.numpy.nan, compiled.params)
    with pytest.raises(InputError, match=r"logits are not finite"):
        compiled.decode(state)


def test_a_selector_of_another_shape_is_refused_with_its_sizes():
    shape = dataclasses.replace(head_shape(MODEL), layers=5)
    other = dataclasses.replace(selector(), shape=shape)
    with pytest.raises(InputError, match=r"does not fit this base model: it has layers 5 instead of 3"):
        generate(base_model(), ["abc"], GenerateConfig(max_new_tokens=1), other)


def test_one_string_is_no_list_of_prompts():
    with pytest.raises(InputError, match=r"the prompts are one string; give a list"):
        generate(base_model(), "Hello")


def test_new_tokens_of_one_are_the_prefills_own():
    cfg = GenerateConfig(max_new_tokens=1)
    assert len(generate(base_model(), ["abc", "defg"], cfg)[1].tokens) == 1


def test_the_report_counts_what_was_done():
    cfg = GenerateConfig(max_new_tokens=10, selection=SPARSE)
    run = Run(engine(cfg, True), TOKENIZER, [list(range(60)), list(range(40))], cfg)
    while not run.is_done:
        run.step()
    report = run.report()
    assert report.prompt_tokens == 100 and report.new_tokens == 18
    # lengths are 69 and 49: every chosen token but the last is cached
    row = 2 * MODEL.head_dim * 4 * MODEL.kv_heads
    budgets = [max(5, n - 8 * n // 10) for n in (69, 49)]
    assert report.reads.tokens == round(sum(budgets) / 2)
    assert report.reads.bytes_dense == 3 * (69 + 49) * row
    assert report.reads.bytes_keys_values == (69 + 49) * row + 2 * sum(budgets) * row
    assert report.reads.bytes_codes == 2 * (69 + 49) * MODEL.kv_heads * 2 * 4


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "the prompt is empty"),
        (["abc", ""], "prompt 1 is empty"),
        ([], "no prompt"),
        (["x" * 600], "600 tokens, and with 8 new ones passes the model's context of 512"),
        (["x" * 505], "context of 512"),
        ([[5, MODEL.vocab]], "token id 320 is not one of the model's"),
        ([[5, -1]], "token id -1 is not one of the model's"),
        (["\udcff"], "not valid Unicode"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, message):
    with pytest.raises(InputError, match=message):
        encode_prompts(TOKENIZER, prompts, 8, MODEL)


def test_prompts_may_be_cut_and_may_be_messages():
    assert encode_prompts(TOKENIZER, ["abc" * 300], 8, MODEL, most=4) == [[97, 98, 99, 97]]
    message = [{"role": "user", "content": "abc"}]
    assert encode_prompts(TOKENIZER, ["abc"], 8, MODEL, is_chat=True) == [encode_chat(TOKENIZER, message, MODEL.vocab)]


def test_progress_counts_the_tokens_of_the_longest_prompt():
    cfg, seen = GenerateConfig(max_new_tokens=1, prefill_chunk=32), []
    Run(engine(cfg, False), TOKENIZER, [[1] * 70, [2] * 9], cfg, progress=lambda *counts: seen.append(counts))
    assert seen == [(32, 70), (64, 70), (70, 70)]


def test_a_context_is_extended_only_by_the_models_own_scaling():
    def scaled(**fields):
        return dataclasses.replace(MODEL, rope=RopeConfig(**fields)).max_context

    assert MODEL.max_context == 512
    assert scaled(kind="linear", factor=4.0) == 2048
    assert scaled(kind="dynamic", factor=2.0, trained_len=512) == 1024
    assert scaled(kind="yarn", factor=4.0, trained_len=512) == 2048
    assert scaled(kind="llama3", factor=8.0, trained_len=16) == 512


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}], MODEL.vocab)


def test_generating_nothing_is_refused():
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        GenerateConfig(max_new_tokens=0)


def test_a_prompt_may_be_token_ids():
    cfg = GenerateConfig(max_new_tokens=5)
    by_ids = generate(base_model(), [[97, 98, 99]], cfg, engine=engine(cfg, False))
    assert by_ids == generate(base_model(), ["abc"], cfg, engine=engine(cfg, False))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dense_run_after_a_sparse_one_reads_its_prompts_from_the_cache(temperature):
    sampling = SamplingConfig(temperature=temperature, seed=3)
    cfg = GenerateConfig(max_new_tokens=12, selection=SPARSE, sampling=sampling, stop=("q",))
    prompts = [[65 + place % 26 for place in range(90)], [70, 71, 72]]
    alone = Run(engine(cfg, False), TOKENIZER, prompts, cfg)
    sparse = Run(engine(cfg, True), TOKENIZER, prompts, cfg)
    for run in (alone, sparse):
        while not run.is_done:
            run.step()
    after = sparse.again(engine(cfg, False))
    prefilled = after.prefill_seconds
    while not after.is_done:
        after.step()
    assert after.results() == alone.results()
    assert prefilled == sparse.prefill_seconds
    assert after.report().reads == alone.report().reads != sparse.report().reads
