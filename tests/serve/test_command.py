"""`spotlight serve` as a process, and `spotlight chat --url` against a server."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from spotlight_jax.commands import chat, remote, serve
from spotlight_jax.config.generation import GenerateConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from tests.byte_tokenizer import byte_tokenizer
from tests.models.tiny import write_folder
from tests.serve.running import serving, serving_process
from tests.serve.test_openai import rendered, wanted

ROOT = Path(__file__).parent.parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "num_hidden_layers": 2,
    "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 400, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_folder(folder, CONFIG)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def process(model_folder):
    with serving_process(model_folder, "--slots", "2", "--context", "400", "--drain", "20") as process:
        yield process


def test_a_signal_lets_running_requests_end_and_leaves(process):
    """Under load: two streams run, one waits; all end whole or in words, and the exit code is 0."""
    ends, texts = {}, {}

    def ask(number):
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0) as client:
            try:
                options = {"model": "tiny", "prompt": "é" * 20, "max_tokens": 300, "stream": True, "seed": number}
                for chunk in client.completions.create(**options):
                    texts[number] = texts.get(number, "") + chunk.choices[0].text
                    ends[number] = chunk.choices[0].finish_reason
            except openai.APIError as error:
                ends[number] = error.message

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(texts) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    finished = [end for end in ends.values() if end in ("stop", "length")]
    assert len(ends) == 4 and len(finished) >= 2
    assert set(ends.values()) <= {"stop", "length", "the server is stopping", "Connection error."}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"slots": 0}, "slots is 0; give at least 1"),
        ({"port": 70_000}, "port is 70000"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"api_key": ""}, "api_key is empty"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)
def test_what_serves_nobody_is_refused(fields, line):
    with pytest.raises(InputError, match=line):
        serve.ServeConfig(**fields)


def test_the_documentation_has_every_flag():
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    fields = [*dataclasses.fields(serve.ServeConfig), *dataclasses.fields(SelectionConfig)]
    names = [field.name.replace("_", "-") for field in fields if field.name != "selection"]
    missing = [name for name in names if f"`--{name}`" not in text and f"`--no-{name}`" not in text]
    assert len(names) > 25 and not missing


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(serve, "EXTRA", ("prometheus_client", "no_such_package"))
    assert serve.command([]) == 2
    wanted_line = "spotlight serve: serving needs no_such_package; run pip install 'spotlight-jax[serve]'\n"
    assert capsys.readouterr().err == wanted_line


def test_a_port_that_is_taken_is_one_line():
    from spotlight_jax.serve.run import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1 port {port}: .*; give another"):
            listen("127.0.0.1", port).close()


def test_the_core_works_without_the_extra():
    """Everything but `serve/` imports without its packages; pydantic is another dependency's, too."""
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "spotlight_jax").rglob("*.py"))
        if "serve" not in file.relative_to(ROOT).parts[:-1] and file.stem != "__main__"
    ]
    code = (
        f"import sys, importlib\nfor name in {set(serve.EXTRA) - {'pydantic'}}: sys.modules[name] = None\n"
        f"[importlib.import_module(name) for name in {modules}]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# chat --url


def talk(url, *lines, new=12, **fields):
    said = iter(lines)

    def read(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    cfg = chat.ChatCommandConfig(generation=GenerateConfig(max_new_tokens=new), url=url, **fields)
    return remote.main(cfg, read)


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def test_a_talk_with_a_server_goes_on(server, capsys):
    messages = talk(server.url, "One", "", "/help", "Two", report=True)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    first = [{"role": "user", "content": "One"}]
    assert messages[1]["content"] == wanted(rendered(first), 12)[1]
    assert messages[3]["content"] == wanted(rendered(messages[:3]), 12)[1]
    shown = capsys.readouterr()
    assert shown.out == f"{messages[1]['content']}\n{messages[3]['content']}\n\n"
    assert f"{len(rendered(first))} prompt tokens" in shown.err and "of the cache read" in shown.err


def test_a_new_talk_forgets_and_a_system_message_stays(server):
    messages = talk(server.url, "One", "/new", "Two", system="Be brief.")
    assert [message["content"] for message in messages[:2]] == ["Be brief.", "Two"] and len(messages) == 3


def test_what_a_server_refuses_is_said_and_the_talk_goes_on(server, capsys):
    messages = talk(server.url, "x" * 400, "One")
    assert [message["content"] for message in messages][:1] == ["One"] and len(messages) == 2
    assert "at most 300" in capsys.readouterr().err


def test_a_talk_with_nobody_is_refused(server):
    with pytest.raises(InputError, match="no server of OpenAI's API answers there"):
        talk("http://127.0.0.1:9", "One")
    with pytest.raises(InputError, match="no such path"):
        talk(f"{server.url}/elsewhere", "One")


def test_a_key_comes_from_the_environment(monkeypatch):
    with serving(api_key="right") as server:
        with pytest.raises(InputError, match="API key is missing or wrong; set SPOTLIGHT_API_KEY"):
            talk(server.url, "One")
        monkeypatch.setenv("SPOTLIGHT_API_KEY", "right")
        assert len(talk(server.url, "One")) == 2


def test_what_a_server_decides_is_no_flag_of_a_talk_with_one():
    for fields in ({"dtype": "float32"}, {"context": 100}, {"generation": GenerateConfig(block=3)}):
        with pytest.raises(InputError, match="is the server's choice; leave it out with --url"):
            chat.ChatCommandConfig(url="http://x", **fields)
    with pytest.raises(InputError, match="begins with http"):
        chat.ChatCommandConfig(url="localhost:8000")
