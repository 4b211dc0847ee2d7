"""spotlight generate, chat and doctor, with a tiny model in place of a real one."""

import json

import jax
import jax.numpy as jnp
import pytest

from spotlight_jax import hashing
from spotlight_jax.checkpoint import Selector, save_selector
from spotlight_jax.commands import chat, doctor, generate, session
from spotlight_jax.errors import InputError
from spotlight_jax.generate import Run, head_shape
from spotlight_jax.memory import MemoryPlan, check_memory, plan_memory
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selection import SelectionConfig
from tests.byte_tokenizer import byte_tokenizer

MODEL = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """Loading gives the tiny model whatever its name; compiled programs stay where the tests keep them."""
    monkeypatch.setattr(
        session,
        "load_model",
        lambda source, dtype: BaseModel(MODEL, init_params(jax.random.key(0), MODEL, dtype), byte_tokenizer(), source),
    )
    for module in (generate, chat):
        monkeypatch.setattr(module, "load_config", lambda source: MODEL)
        monkeypatch.setattr(module, "open_tokenizer", lambda source: byte_tokenizer())
        monkeypatch.setattr(module, "use_compile_cache", lambda: None)


@pytest.fixture
def selector_folder(tmp_path):
    cfg, shape = hashing.HashConfig(code_bits=64, hidden=24), head_shape(MODEL)
    save_selector(
        tmp_path / "selector", Selector(cfg, shape, hashing.init_params(jax.random.key(1), cfg, shape), "tiny", {}), ""
    )
    return tmp_path / "selector"


def test_generate_shows_text_and_report_and_one_line_of_json(capsys, selector_folder):
    args = ["--selector", str(selector_folder), "--prompt", "x" * 100, "--max-new-tokens", "6", "--ignore-eos"]
    args += ["--keep", "0.1", "--min-context", "0", "--dense-layers", "0", "--json"]
    assert generate.command(args) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert len(result["results"][0]["tokens"]) == 6
    assert result["reads"]["tokens"] == 20 and result["reads"]["bytes_codes"] > 0
    assert "20 tokens per head (keep 0.1)" in shown.out and "layers 0 of 3" in shown.out
    assert "memory: weights" in shown.err


def test_streamed_output_holds_the_same_text(capsys):
    args = ["--prompt", "abc", "--max-new-tokens", "20", "--ignore-eos"]
    assert generate.command([*args, "--json"]) == 0
    text = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["text"]
    assert generate.command([*args, "--stream"]) == 0
    assert capsys.readouterr().out.startswith(text)


def test_compare_shows_both(capsys, selector_folder):
    args = ["--selector", str(selector_folder), "--prompt", "abcdef", "--max-new-tokens", "4", "--compare"]
    assert generate.command(args) == 0
    out = capsys.readouterr().out
    assert "dense:" in out and "sparse:" in out and " x)" in out


def test_ctrl_c_in_a_stream_still_reports(capsys, monkeypatch):
    step = Run.step

    def interrupted(run, limit=None):
        if run.tokens[0][1:]:
            raise KeyboardInterrupt
        return step(run, limit)

    monkeypatch.setattr(Run, "step", interrupted)
    args = ["--prompt", "abc", "--stream", "--ignore-eos", "--max-new-tokens", "40"]
    assert generate.command(args) == 130
    shown = capsys.readouterr()
    assert "decode      4 tokens" in shown.out and "interrupted" in shown.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no prompt"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 600], "passes the model's context of 512"),
        (["--prompt", "a", "--keep", "0"], "keep is 0.0"),
        (["--prompt", "a", "--keep", "1.5"], "keep is 1.5"),
        (["--prompt", "a", "--budget", "0"], "budget is 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--prompt-tokens", "0"], "prompt_tokens is 0"),
        (["--prompt-file", "no/such/file.txt"], "no such file"),
        (["--prompt", "a", "--compare"], "give --selector"),
        (["--prompt", "a", "b", "--stream"], "--stream shows one text"),
        (["--prompt", "a", "--selector", "no/such/run"], "is no selector"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk is 0"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(args, message, capsys):
    assert generate.command(args) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("spotlight generate: ")


def test_a_selector_of_another_model_is_refused_before_the_weights_are_loaded(tmp_path, capsys, monkeypatch):
    cfg, shape = hashing.HashConfig(code_bits=64, hidden=24), hashing.HeadShape(5, 4, 2, 8)
    params = hashing.init_params(jax.random.key(1), cfg, shape)
    save_selector(tmp_path / "other", Selector(cfg, shape, params, "other", {}), "")
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    assert generate.command(["--prompt", "abc", "--selector", str(tmp_path / "other")]) == 2
    assert "does not fit this base model" in capsys.readouterr().err


def test_a_binary_file_is_no_prompt(tmp_path, capsys):
    file = tmp_path / "image.bin"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert generate.command(["--prompt-file", str(file)]) == 2
    assert "not a readable UTF-8 text file" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_the_numbers_before_loading(monkeypatch, capsys):
    monkeypatch.setattr(session, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    assert generate.command(["--prompt", "abc"]) == 2
    assert "not enough memory: weights" in capsys.readouterr().err
    check_memory(MemoryPlan(1, 2, 3, 4), 10)
    check_memory(MemoryPlan(1, 2, 3, 4), None)
    with pytest.raises(InputError):
        check_memory(MemoryPlan(1, 2, 3, 5), 10)


def test_the_memory_plan_by_hand():
    hash_cfg = hashing.HashConfig(code_bits=128)
    plan = plan_memory(PRESETS["qwen2.5-7b"], jnp.dtype("bfloat16"), 1, 131072, 2048, hash_cfg, SelectionConfig())
    assert plan.cache == 2 * 28 * 131072 * 4 * 128 * 2
    assert plan.codes == 26 * 131072 * 4 * 16
    assert plan.weights == 7_615_616_512 * 2  # the parameters that the model's card gives
    assert plan.codes / (plan.cache * 26 / 28) == 1 / 32


def talk(monkeypatch, lines, **fields):
    said = iter(lines)

    def read(_):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    return chat.main(chat.ChatCommandConfig(max_new_tokens=6, **fields), read)


def test_a_talk_keeps_what_was_said(capsys, monkeypatch):
    messages = talk(monkeypatch, ["hello", "", "and then?", "/quit", "never said"], system="be brief")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "hello" and messages[3]["content"] == "and then?"


def test_a_second_turn_answers_as_if_the_whole_talk_were_its_prompt(capsys, monkeypatch):
    messages = talk(monkeypatch, ["hello", "and then?"])
    tokens = generate.encode_chat(byte_tokenizer(), messages[:3])
    model = session.load_model("tiny", "float32")
    cfg = chat.ChatCommandConfig(max_new_tokens=6).generation()
    (expected,) = generate_texts(model, tokens, cfg)
    assert messages[3]["content"] == expected.text


def generate_texts(model, tokens, cfg):
    from spotlight_jax.generate import generate as continue_prompts

    return continue_prompts(model, [tokens], cfg)


def test_new_forgets_and_a_full_talk_is_said(capsys, monkeypatch):
    messages = talk(monkeypatch, ["x" * 600, "hello", "/new", "again"])
    assert [message["content"] for message in messages if message["role"] == "user"] == ["again"]
    assert "fills the model's context of 512" in capsys.readouterr().err


def test_doctor_names_versions_device_ops_and_folders(capsys, own_cache, monkeypatch):
    monkeypatch.setattr(doctor, "use_compile_cache", lambda: own_cache / "compiled")
    assert doctor.command([]) == 0
    out = capsys.readouterr().out
    for word in ("jaxlib", "cpu 0", "GiB free", "match_score", "select_top", "sparse_attention", "compiled"):
        assert word in out
