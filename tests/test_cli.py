import contextlib
import dataclasses
import errno
import importlib
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from spotlight_jax import cli
from spotlight_jax.config.data import DataConfig
from spotlight_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Config:
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mode: Literal["stream", "store"] = "stream"
    """Where hidden states live."""
    resume: bool = False
    """Continue the run in the folder."""


def _run(*args: str, main=lambda cfg: None) -> int:
    return cli.run(main, _Config, "spotlight test", "A test.", list(args))


def test_flags_reach_the_config():
    seen = []
    assert _run("--data.window", "64", "--mode", "store", "--data.train", "a.txt", "b.txt", main=seen.append) == 0
    assert seen == [_Config(DataConfig(train=("a.txt", "b.txt"), window=64), "store")]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--data.windw", "3"], "unknown flag '--data.windw'; did you mean '--data.window'?"),
        (["--resum"], "unknown flag '--resum'; did you mean '--resume'?"),
        (["--n", "3"], "unknown flag '--n'; see --help"),
        (["--mode", "strem"], "Did you mean 'stream'?"),
        (["--data.window", "many"], "'many'"),
        (["--data.window"], "--data.window"),
        (["--data.window", "1"], "window must be at least 2 tokens, not 1"),
        (["book.txt"], "'book.txt' follows no flag"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(args, told, capsys):
    assert _run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("spotlight test: ") and told in err
    assert "│" not in err and "──" not in err


def test_bad_input_gets_one_line_and_exit_code_2(capsys):
    def main(cfg):
        raise InputError("no such file:\n'x.txt'")

    assert _run(main=main) == 2
    assert capsys.readouterr().err == "spotlight test: no such file: 'x.txt'\n"


def test_interrupting_exits_with_130(capsys):
    def main(cfg):
        raise KeyboardInterrupt

    assert _run(main=main) == 130
    assert capsys.readouterr().err == "spotlight test: interrupted\n"


def test_our_own_bugs_keep_their_traceback():
    def main(cfg):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        _run(main=main)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        _run("--help")
    assert stop.value.code in (None, 0)
    text = capsys.readouterr().out
    for flag in ("--data.train", "--data.held-out", "--data.window", "--mode", "--resume"):
        assert flag in text
    assert "Where hidden states live." in text and "Tokens in one window." in text


def _spotlight(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spotlight_jax.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_lists_its_subcommands_without_importing_jax():
    begin = time.monotonic()
    done = _spotlight("--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: spotlight")
    assert time.monotonic() - begin < 2  # alone it takes a tenth of a second; JAX alone would take more
    code = "import sys; from spotlight_jax import cli; cli.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_an_unknown_command_gets_one_line_and_exit_code_2():
    done = _spotlight("trian")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "there is no command 'trian'" in done.stderr


def test_a_command_is_imported_only_when_it_is_called(tmp_path, monkeypatch, capsys):
    (tmp_path / "slow_command.py").write_text(
        "import sys\n\n\ndef command(args):\n    print(args)\n    return 7\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "_COMMANDS", (("slow", "slow_command", "takes its time"),))
    assert cli.main([]) == 0
    assert re.search(r"^  slow +takes its time$", capsys.readouterr().out, re.MULTILINE)
    assert "slow_command" not in sys.modules
    assert cli.main(["slow", "--deep", "1"]) == 7
    assert capsys.readouterr().out == "['--deep', '1']\n"
    assert cli.main(["slo"]) == 2
    assert "did you mean 'slow'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ───╮\n│ Error parsing -x: not a │\n│ number │\n│ ────── │\n│ Argument helptext: │\n╰─────╯\n",
        " Value error  \n ------------ \n Error parsing -x: not a \n number \n ---- \n Argument helptext: \n",
    ],
)
def test_the_message_comes_out_of_either_box(box):
    assert cli._explain(box) == "-x: not a number"


FLAT = """
import dataclasses, sys
from tyro.conf import OmitArgPrefixes
from spotlight_jax import cli
from spotlight_jax.data import DataConfig

@dataclasses.dataclass(frozen=True)
class Config:
    data: OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)

def main(cfg):
    print(cfg.data.window)
    for _ in range(cfg.data.seed):
        print("line")

sys.exit(cli.run(main, Config, "flat", "A test."))
"""


def test_a_terminals_colours_do_not_reach_the_message():
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", FLAT, "--window", "many"], stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 2
    assert shown.splitlines() == ["flat: --window: invalid literal for int() with base 10: 'many'"]


def test_flags_without_prefix_are_known_by_their_short_names():
    done = subprocess.run([sys.executable, "-c", FLAT, "--windw", "3"], capture_output=True, text=True, check=False)
    assert done.stderr == "flat: unknown flag '--windw'; did you mean '--window'?\n"


@pytest.mark.parametrize("args", [["--seed", "100000"], ["--seed", "10"], ["--help"]])
def test_a_reader_that_wants_no_more_is_no_error(args):
    ours, theirs = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", FLAT, *args], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    os.close(ours)
    assert process.communicate()[1] == "" and process.returncode == 141


def test_a_noted_signal_interrupts_only_the_second_time():
    before = signal.getsignal(signal.SIGINT)
    with cli.noted_signals(signal.SIGINT) as received:
        assert not received
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_a_library_swallows_comes_again():
    with pytest.raises(KeyboardInterrupt), cli.insistent_interrupt(again_after=0.05):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        time.sleep(5)
        pytest.fail("was swallowed")
    time.sleep(0.1)  # and never after the block
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with cli.noted_signals(*cli.STOPPING) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop == []
    finally:
        signal.signal(signal.SIGHUP, previous)
    with cli.noted_signals(*cli.STOPPING) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop == [signal.SIGHUP]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "Disk quota exceeded; free some space, or ask for a larger quota"),
        (errno.EROFS, "Read-only file system; give a folder on a disk that can be written"),
        (errno.EIO, "Input/output error; the disk or the connection to it fails"),
    ],
)
def test_a_disk_that_fails_is_one_line_that_names_the_file(code, told, capsys):
    def main(cfg):
        raise OSError(code, os.strerror(code), "some/file")

    assert _run(main=main) == 2
    assert capsys.readouterr().err == f"spotlight test: 'some/file': {told}\n"


def test_every_command_of_the_table_is_there():
    for name, module, text in cli._COMMANDS:
        assert callable(importlib.import_module(module).command), name
        assert text


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["eval", "speeed"], "there is no command 'eval speeed'; did you mean 'eval speed'?"),
        (["eval", "x"], "there is no command 'eval x'; there are: eval decode, eval fidelity"),
    ],
)
def test_a_wrong_evaluation_is_told_which_there_are(args, told, capsys):
    assert cli.main(args) == 2
    assert told in capsys.readouterr().err


def test_help_of_evaluations_lists_them(capsys):
    assert cli.main(["eval", "--help"]) == 0
    assert "eval perplexity" in capsys.readouterr().out


def test_help_for_a_closed_pipe_or_a_full_disk_is_no_traceback():
    command = f"{sys.executable} -m spotlight_jax.cli --help"
    closed = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True, check=False)
    assert closed.stderr == ""
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert (
        full.returncode == 2 and full.stderr == "spotlight: cannot write to standard output: No space left on device\n"
    )


def test_help_works_where_only_ascii_is_known():
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    for args in (["--help"], ["doctor", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "spotlight_jax.cli", *args], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0 and done.stderr == b"" and b"usage" in done.stdout


def test_a_platform_without_a_device_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "spotlight_jax.cli", "doctor"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        pytest.skip("there is a CUDA device here")
    assert done.returncode == 2 and "jaxlib" in done.stdout, "versions are shown all the same"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("spotlight doctor: JAX finds no device for JAX_PLATFORMS=cuda")
    assert "Traceback" not in done.stderr


def test_own_packages_are_found_beside_a_users_train_and_eval(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('the user's')")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise SystemExit('the user's')")
    for args in (["demo", "--help"], ["eval", "fidelity", "--help"]):
        code = f"import sys; from spotlight_jax import cli; sys.exit(cli.main({args}))"
        path = os.pathsep.join([".", str(Path(cli.__file__).parents[1])])
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_control_characters_of_names_are_shown_and_not_sent(capsys):
    def main(cfg):
        raise InputError("no such file: 'a\x1b[31mb\x07'")

    assert _run(main=main) == 2
    assert capsys.readouterr().err == "spotlight test: no such file: 'a\\x1b[31mb\\x07'\n"


@pytest.mark.parametrize("name", ["spotlight_jax.derived", "eval.needle.haystack"])
def test_a_notice_is_a_plain_line_whatever_libraries_set_up(name, capsys):
    logging.basicConfig(force=True)  # as a library may have done

    def main(cfg):
        logging.getLogger(name).warning("'%s' is damaged", "a\x1b[31m")

    try:
        assert _run(main=main) == 0
    finally:
        logging.root.handlers.clear()
    assert capsys.readouterr().err == "'a\\x1b[31m' is damaged\n"
    assert not logging.getLogger("spotlight_jax").handlers, "nothing is left behind"
