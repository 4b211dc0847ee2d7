"""spotlight generate, chat and doctor, with a tiny model in place of a real one."""

import dataclasses
import io
import json
import os
import pty
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from spotlight_jax.commands import chat, completion, doctor, generate, machine, session, talk
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import Run, head_shape
from spotlight_jax.generation import generate as continue_prompts
from spotlight_jax.memory import MemoryPlan, check_memory, plan_memory
from spotlight_jax.models.config import RopeConfig
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.load import BaseModel
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, save_selector
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.text_stream import BROKEN
from spotlight_jax.token_ids import encode_chat
from tests.byte_tokenizer import byte_tokenizer

MODEL = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """Loading gives the tiny model whatever its name; compiled programs stay where the tests keep them."""
    monkeypatch.setattr(
        session,
        "load_model",
        lambda source, dtype, placement=None: BaseModel(
            MODEL, init_params(jax.random.key(0), MODEL, dtype, placement), byte_tokenizer(), source
        ),
    )
    monkeypatch.setattr(session, "load_config", lambda source: MODEL)
    for module in (completion, talk):
        monkeypatch.setattr(module, "open_tokenizer", lambda source: byte_tokenizer())
        monkeypatch.setattr(module, "use_compile_cache", lambda: None)


@pytest.fixture
def selector_folder(tmp_path):
    cfg, shape = TransformConfig(code_bits=64), head_shape(MODEL)
    save_selector(tmp_path / "selector", Selector(shape, init_functions(jax.random.key(1), cfg, shape), "tiny", {}), "")
    return tmp_path / "selector"


def test_json_alone_is_on_stdout_and_the_report_on_stderr(capsys, selector_folder):
    args = ["--selector", str(selector_folder), "--prompt", "x" * 100, "--max-new-tokens", "6", "--ignore-eos"]
    args += ["--keep", "0.1", "--min-context", "0", "--dense-layers", "0", "--json"]
    assert generate.command(args) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert shown.out.count("\n") == 1 and len(result["results"][0]["tokens"]) == 6
    assert result["reads"]["tokens"] == 20 and result["reads"]["bytes_codes"] > 0
    assert "20 tokens per head (keep 0.1)" in shown.err and "layers 0 of 3" in shown.err
    assert "memory: weights" in shown.err


def test_the_model_is_the_selectors_unless_one_is_named(capsys, selector_folder):
    prompt = ["--prompt", "abc", "--max-new-tokens", "1", "--json"]
    for args, name in (
        ([], "smollm2-135m"),
        (["--selector", str(selector_folder)], "tiny"),
        (["--selector", str(selector_folder), "--model", "own/tiny"], "own/tiny"),
    ):
        assert generate.command([*args, *prompt]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == name


def test_a_prompt_beyond_the_positions_that_a_selector_covers_gets_one_line(capsys, tmp_path):
    cfg, shape = TransformConfig(code_bits=64), head_shape(MODEL)
    params = init_functions(jax.random.key(1), cfg, shape)
    save_selector(tmp_path / "short", Selector(shape, params, "tiny", {}, 100), "")
    for tokens, count in ((90, 0), (97, 1)):  # with four new ones
        args = ["--selector", str(tmp_path / "short"), "--prompt", "x" * tokens, "--max-new-tokens", "4"]
        assert generate.command(args) == 0
        shown = capsys.readouterr().err
        assert shown.count("was fitted to positions up to 100") == count
        assert shown.count("train one with --length 101") == count


def test_the_report_says_when_a_selector_did_not_pay(capsys, selector_folder):
    assert generate.command(["--selector", str(selector_folder), "--prompt", "abc", "--max-new-tokens", "4"]) == 0
    assert "all 6 tokens (too few for reading less to pay" in capsys.readouterr().err


STRANGE = "a [bold]b[/b] :cat: " + "long " * 100 + "\N{GREEK SMALL LETTER BETA}"


@pytest.fixture
def strange_text(monkeypatch):
    """Every text comes out as one that looks like markup and fills several lines."""
    results = Run.results
    monkeypatch.setattr(Run, "results", lambda run: [dataclasses.replace(each, text=STRANGE) for each in results(run)])


def test_stdout_holds_the_text_as_it_is_and_nothing_else(capsys, strange_text):
    assert generate.command(["--prompt", "abc", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == STRANGE + "\n"
    assert generate.command(["--prompt", "abc", "de", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == f"--- prompt 0\n{STRANGE}\n--- prompt 1\n{STRANGE}\n"


def test_compared_texts_are_no_markup(capsys, selector_folder, strange_text):
    args = ["--selector", str(selector_folder), "--prompt", "abc", "--max-new-tokens", "2", "--compare"]
    assert generate.command(args) == 0
    assert capsys.readouterr().out.count("[bold]b[/b] :cat:") == 2


def test_streamed_output_is_the_text(capsys):
    args = ["--prompt", "abc", "--max-new-tokens", "20", "--ignore-eos"]
    assert generate.command([*args, "--json"]) == 0
    text = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["text"]
    assert generate.command([*args, "--stream"]) == 0
    assert capsys.readouterr().out == text + "\n"


def texts_after(args, capsys):
    assert generate.command(["--max-new-tokens", "8", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["results"]


@pytest.mark.parametrize("is_compared", [False, True], ids=["alone", "compared"])
def test_json_lines_of_prompts_give_json_lines_of_results(is_compared, capsys, tmp_path, selector_folder):
    prompts = ["abc", 'two\nlines and "quotes" \u2028', "de"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text, "id": 7}) for text in prompts) + "\n\n", encoding="utf-8")
    flags = ["--max-new-tokens", "4", "--json", "--selector", str(selector_folder), *["--compare"] * is_compared]
    assert generate.command([*flags, "--prompt", *prompts]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert generate.command([*flags, "--prompts", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.pop("index") for row in rows] == [0, 1, 2]
    for place, row in enumerate(rows):
        assert row.pop("command") == "generate" and row.pop("model") == whole["model"]
        for way in ("sparse", "dense") if is_compared else (None,):
            one, all_of_them = (row[way], whole[way]) if way else (row, whole)
            assert one["text"] == all_of_them["results"][place]["text"]
            assert one["tokens"] == all_of_them["results"][place]["tokens"]
            assert one["reads"] == all_of_them["reads"]
            named = all_of_them.keys() - {"command", "model", "results"} | all_of_them["results"][place].keys()
            assert one.keys() == named


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "x"}', "prompts.jsonl:2' has no 'prompt'"),
        ('{"prompt": 3}', "prompts.jsonl:2' has 3 as its 'prompt'"),
        ('{"prompt": null}', "prompts.jsonl:2' has None as its 'prompt'"),
        ('{"prompt": ""}', "prompts.jsonl:2' has '' as its 'prompt'"),
        ('{"prompt": "\\ud800"}', "prompts.jsonl:2' is not valid Unicode"),
        ('["x"]', "prompts.jsonl:2' is not a JSON object"),
        ("{", "prompts.jsonl:2"),
    ],
    ids=["missing", "number", "null", "empty", "surrogate", "list", "broken"],
)
def test_a_row_that_is_no_prompt_is_named_before_a_model_is_loaded(line, told, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    assert generate.command(["--prompts", str(file), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


def test_a_prompt_may_be_piped_in(capsys, monkeypatch, tmp_path):
    expected = texts_after(["--prompt", "abc"], capsys)
    for args in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
        assert texts_after(args, capsys) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"never read")))
    assert texts_after(["--prompt", "abc"], capsys) == expected


@pytest.mark.parametrize(("piped", "message"), [(b"", "prompt is empty"), (b"\xff\xfe", "standard input is not UTF-8")])
def test_what_is_piped_in_may_be_no_prompt(capsys, monkeypatch, piped, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
    assert generate.command([]) == 2
    assert message in capsys.readouterr().err


def test_compare_shows_both(capsys, selector_folder):
    args = ["--selector", str(selector_folder), "--prompt", "abcdef", "--max-new-tokens", "4", "--compare"]
    assert generate.command(args) == 0
    out = capsys.readouterr().out
    assert "dense:" in out and "sparse:" in out and " x)" in out


@pytest.fixture
def interrupt(monkeypatch):
    """Sends Ctrl-C during a call of one of the engine's methods: before the `call`-th one gives its result."""

    def during(method, call, times=1):
        real, calls = getattr(Engine, method), []

        def interrupted(*args, **options):
            result = real(*args, **options)
            calls.append(1)
            for _ in range(times if len(calls) == call else 0):
                signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(Engine, method, interrupted)

    return during


@pytest.mark.parametrize(("flags", "count"), [(["--stream"], 8), ([], 32)])
def test_ctrl_c_while_decoding_still_shows_text_and_report(capsys, interrupt, flags, count):
    args = ["--prompt", "abc", "--ignore-eos", "--max-new-tokens", "80"]
    (whole,) = texts_after([*args, "--max-new-tokens", str(count + 1)], capsys)
    interrupt("decode", 2 if flags else 1)
    assert generate.command([*args, *flags]) == 130
    shown = capsys.readouterr()
    assert shown.out == whole["text"].rstrip(BROKEN) + "\n"  # bytes of half a character are still held back
    assert f"decode      {count} tokens" in shown.err
    assert shown.err.splitlines()[-1] == "spotlight generate: interrupted"


@pytest.mark.parametrize(("method", "times"), [("prefill", 1), ("decode", 2)])
def test_ctrl_c_in_a_prompt_or_twice_ends_at_once(capsys, interrupt, method, times):
    interrupt(method, 1, times)
    assert generate.command(["--prompt", "abc", "--stream"]) == 130
    shown = capsys.readouterr()
    assert shown.out == "" and "decode " not in shown.err
    assert shown.err.splitlines()[-1] == "spotlight generate: interrupted"


def test_a_terminal_shows_what_is_waited_for_and_a_file_nothing():
    shown = []
    for is_terminal in (True, False):
        file = io.StringIO()
        with session.waiting(Console(file=file, force_terminal=is_terminal), "reading [b] the prompt") as show:
            show(3, 4)
        shown.append(file.getvalue())
    assert "reading [b] the prompt" in shown[0] and "75%" in shown[0]
    assert shown[1] == ""


def test_no_prompt_is_refused(capsys, monkeypatch):
    ours, theirs = pty.openpty()
    with open(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        assert generate.command([]) == 2
    os.close(ours)
    assert "there is no prompt; give --prompt TEXT or --prompt-file FILE, or pipe one in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
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
        (["--prompt", "a", "--stream", "--compare", "--selector", "x"], "leave out --stream"),
        (["--prompt", "a", "--kep", "0.1"], "did you mean '--keep'?"),
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
    cfg, shape = TransformConfig(code_bits=64), HeadShape(5, 4, 2, 8)
    params = init_functions(jax.random.key(1), cfg, shape)
    save_selector(tmp_path / "other", Selector(shape, params, "other", {}), "")
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    assert generate.command(["--prompt", "abc", "--selector", str(tmp_path / "other")]) == 2
    assert "does not fit this base model" in capsys.readouterr().err


def test_a_stop_string_that_no_text_can_hold_is_said(capsys):
    assert generate.command(["--prompt", "abc", "--max-new-tokens", "1", "--stop", "<end>!"]) == 0
    assert "'<end>!' can never match" in capsys.readouterr().err


def test_an_argument_that_is_not_utf8_is_one_line(capsys):
    assert generate.command(["--prompt", "caf\udce9", "--max-new-tokens", "1"]) == 2
    assert "not valid Unicode" in capsys.readouterr().err


def test_a_binary_file_is_no_prompt(tmp_path, capsys):
    file = tmp_path / "image.bin"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert generate.command(["--prompt-file", str(file)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_the_numbers_before_loading(monkeypatch, capsys):
    monkeypatch.setattr(session, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    assert generate.command(["--prompt", "abc"]) == 2
    assert "not enough memory: weights" in capsys.readouterr().err
    check_memory(MemoryPlan(1, 2, 3, 4), 10)
    check_memory(MemoryPlan(1, 2, 3, 4), None)
    with pytest.raises(InputError, match="give --dtype bfloat16, a shorter prompt"):
        check_memory(MemoryPlan(1, 2, 3, 5), 10, np.dtype("float32"))
    with pytest.raises(InputError):
        check_memory(MemoryPlan(1, 2, 3, 5), 10)


def test_the_memory_plan_by_hand():
    hash_cfg = TransformConfig(code_bits=128)
    plan = plan_memory(PRESETS["qwen2.5-7b"], jnp.dtype("bfloat16"), 1, 131072, 2048, hash_cfg, SelectionConfig())
    assert plan.cache == 2 * 28 * 131072 * 4 * 128 * 2
    assert plan.codes == 26 * 131072 * 4 * 16
    assert plan.weights == 7_615_616_512 * 2  # the parameters that the model's card gives
    assert plan.codes / (plan.cache * 26 / 28) == 1 / 32


def have_talk(lines, new=6, **fields):
    """The messages of a talk in which these lines were said; None is Ctrl-C at the prompt."""
    said = iter(lines)

    def read(_):
        line = next(said, EOFError)
        if line is EOFError:
            raise EOFError
        if line is None:
            raise KeyboardInterrupt
        return line

    return talk.main(chat.ChatCommandConfig(generation=GenerateConfig(max_new_tokens=new), **fields), read)


def users(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


def test_a_talk_keeps_what_was_said(capsys):
    messages = have_talk(["hello", "", "and then?", "/quit", "never said"], system="be brief")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "hello" and messages[3]["content"] == "and then?"


def answer_to(messages, new=6):
    """What the model says after these messages, all of them in one prompt."""
    model = session.load_model("tiny", "float32")
    tokens = encode_chat(byte_tokenizer(), messages, MODEL.vocab)
    return continue_prompts(model, [tokens], GenerateConfig(max_new_tokens=new))[0].text


def test_a_second_turn_answers_as_if_the_whole_talk_were_its_prompt(capsys):
    messages = have_talk(["hello", "and then?"])
    assert messages[3]["content"] == answer_to(messages[:3])


@pytest.mark.parametrize(
    ("rope", "counts"),
    [
        (MODEL.rope, [22, 26]),  # [user]hello[assistant], and then [user]and then?[assistant] alone
        (RopeConfig("dynamic", factor=4.0, trained_len=30), [22, 51]),
    ],
)
def test_a_turn_reads_what_is_new_unless_rope_turns_all_keys_anew(capsys, monkeypatch, rope, counts):
    model, prefill, seen = dataclasses.replace(MODEL, rope=rope), Engine.prefill, []

    def counted(engine, prompts, *args):
        seen.append(len(prompts[0]))
        return prefill(engine, prompts, *args)

    monkeypatch.setattr(sys.modules[__name__], "MODEL", model)
    monkeypatch.setattr(Engine, "prefill", counted)
    messages = have_talk(["hello", "and then?"], new=4)
    assert messages[1]["content"].isascii()  # else its bytes are other tokens when it is read again
    assert seen == counts
    assert messages[3]["content"] == answer_to(messages[:3], 4)


def test_new_forgets_and_a_full_talk_is_said(capsys):
    messages = have_talk(["x" * 600, "hello", "y" * 480, "/new", "again"])
    assert users(messages) == ["again"]
    too_much, full = [line for line in capsys.readouterr().err.splitlines() if "passes its limit of 512" in line]
    assert "shorten what you said" in too_much and "/new" in full


def test_a_talk_may_be_held_shorter_than_the_models_context(capsys):
    assert users(have_talk(["x" * 100, "hello"], context=90)) == ["hello"]
    assert "passes its limit of 90" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"at most 6 tokens has no room for answers of 6; .* --context"):
        have_talk(["hello"], context=6)


def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_end(capsys):
    assert users(have_talk([None, "hello"])) == ["hello"]
    assert capsys.readouterr().err.count("Ctrl-D ends") == 2


def test_ctrl_c_cuts_an_answer_short_and_the_talk_goes_on(capsys, interrupt):
    interrupt("decode", 2)
    messages = have_talk(["hello", "and then?"], new=40)
    assert messages[1]["content"] == answer_to(messages[:1], 9).rstrip(BROKEN) != ""
    assert messages[3]["content"] == answer_to(messages[:3], 40)
    assert f"{messages[1]['content']} ...\n" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "times"), [("prefill", 1), ("decode", 2)])
def test_ctrl_c_before_an_answer_or_twice_leaves_the_talk_as_it_was(capsys, interrupt, method, times):
    interrupt(method, 2, times)  # the second block, or the second turn's prompt
    messages = have_talk(["hello", "and then?", "and now?"], new=5)
    kept = ["hello", "and now?"]
    assert users(messages) == kept
    assert messages[3]["content"] == answer_to(messages[:3], 5)
    assert "the talk is as it was before" in capsys.readouterr().err


def test_a_line_that_is_no_text_is_said_and_the_talk_goes_on(capsys):
    assert users(have_talk(["hello", "one bad byte \udcff", "and then?"])) == ["hello", "and then?"]
    assert "is not valid Unicode" in capsys.readouterr().err


def test_a_bad_byte_on_standard_input_costs_its_line_alone(capsys, monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(b"hello\nbad \xff byte\nand then?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", said)
    messages = talk.main(chat.ChatCommandConfig(generation=GenerateConfig(max_new_tokens=2)))
    assert users(messages) == ["hello", "and then?"]


def test_a_template_that_takes_no_system_message_is_refused_at_the_start(capsys, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"
    )
    monkeypatch.setattr(talk, "open_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"chat template cannot write these messages \(system, user\): no system role"):
        have_talk(["hello"], system="be brief")


def test_an_answer_that_its_length_ends_says_so(capsys):
    have_talk(["hello"], report=True)
    assert "the answer ends at --max-new-tokens 6" in capsys.readouterr().err


def test_doctor_names_versions_device_ops_and_folders(capsys, own_cache, monkeypatch):
    monkeypatch.setattr(machine, "use_compile_cache", lambda: own_cache / "compiled")
    assert doctor.command([]) == 0
    out = capsys.readouterr().out
    for word in ("jaxlib", "cpu 0", "GiB free", "match_score", "score_select", "sparse_attention", "compiled"):
        assert word in out
