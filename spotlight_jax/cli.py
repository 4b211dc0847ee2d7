"""Commands: flags to a frozen dataclass, bad input to one line and exit code 2, and the `spotlight` command."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spotlight_jax.errors import InputError, printable
from spotlight_jax.fields import classes_of, is_config

Config = TypeVar("Config")

BROKEN_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ended
_DISK_ADVICE = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some space, or ask for a larger quota",
    errno.EROFS: "; give a folder on a disk that can be written",
    errno.EACCES: "; give a folder that you may write",
    errno.EIO: "; the disk or the connection to it fails",
}

# Command name, the module whose `command(args) -> int` runs it, and what it is for.
_COMMANDS = (
    ("demo", "train.demo", "train on the embedded model, then generate dense and sparse side by side"),
    ("train", "train.layerwise", "train the hash functions of a model"),
    ("generate", "spotlight_jax.commands.generate", "continue a prompt, reading only the tokens that matter"),
    ("chat", "spotlight_jax.commands.chat", "chat with a model in the terminal"),
    ("serve", "spotlight_jax.commands.serve", "serve a model to many clients at once, over OpenAI's API"),
    ("push", "spotlight_jax.commands.push", "send a selector to Hugging Face's hub"),
    ("doctor", "spotlight_jax.commands.doctor", "check this machine and installation"),
    ("eval decode", "eval.decode", "prefill and decoding at a model's shape, dense and sparse"),
    ("eval fidelity", "eval.fidelity", "how far the answers of two prediction folders agree"),
    (
        "eval harness",
        "eval.harness",
        "tasks of lm-evaluation-harness (MMLU, RULER, ...) with any method",
    ),
    ("eval inspect", "eval.inspect", "how good each method's selections are, by layer and head"),
    ("eval longbench", "eval.longbench", "LongBench's 21 tasks, answered or scored"),
    ("eval needle", "eval.needle", "needle in a haystack, by length and depth"),
    ("eval perplexity", "eval.perplexity", "perplexity of texts as each method reads"),
    ("eval report", "eval.report", "several evaluations, and one page of their results"),
    ("eval speed", "eval.speed", "time of a layer's operations and of decoding, by length and batch"),
)
_ROOT = Path(__file__).resolve().parent.parent  # where `train` and `eval` lie beside `spotlight_jax`


def run(
    main: Callable[[Config], object],
    config_class: type[Config],
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
    default: Config | Callable[[Sequence[str]], Config | None] | None = None,
) -> int:
    """Parse flags into a config, call `main` with it, and return the exit code.

    0: done; 2: the input cannot be used or the disk fails, which one line on stderr explains; 130: interrupted; 141:
    the reader of our output has closed it (`| head`). Any other exception is our bug and keeps its traceback. Flags and
    their help come from the config's fields and the docstrings under them.

    Args:
        main: takes the config.
        config_class: a frozen dataclass whose fields are the flags.
        prog: name of the command, for help and errors.
        description: what it is for, above the flags.
        args: command line; None: that of this process.
        default: a config whose values the flags start from, or what finds it by the flags (of the run they resume).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone still gets its text
    try:
        try:
            given = list(sys.argv[1:] if args is None else args)
            start = default(given) if callable(default) else default
            with _plain_notices():
                main(parse(config_class, prog, description, given, start))
        finally:
            sys.stdout.flush()  # a closed pipe is met here, not after the last line of ours
    except InputError as error:
        return _fail(prog, str(error))
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:  # a full or failing disk, a folder that may not be written
        _drop_stdout()
        where = f"'{error.filename}': " if error.filename else ""
        return _fail(prog, f"{where}{error.strerror or error}{_DISK_ADVICE.get(error.errno or 0, '')}")
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


class _Notices(logging.Handler):
    """Notices of ours as plain lines on stderr, wherever that is at the time: a live line may stand before it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a notice; what a file's name holds is shown and not sent."""
        with contextlib.suppress(OSError):
            print(printable(record.getMessage()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _plain_notices() -> Iterator[None]:
    """Show notices as they are, whatever a library told `logging` to put before them."""
    loggers, handler = [logging.getLogger(name) for name in ("spotlight_jax", "train", "eval")], _Notices()
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


def main_of(module: str) -> Callable[[Any], Any]:
    """Return the `main` of a module that is imported when it is called: flags and `--help` wait for no JAX."""

    def main(cfg: Any) -> Any:
        return importlib.import_module(module).main(cfg)

    return main


def _drop_stdout() -> None:
    """Send what is still buffered for stdout nowhere where it cannot be written: Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # no file behind stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(
    config_class: type[Config],
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
    default: Config | None = None,
) -> Config:
    """Parse flags into a config; raises InputError for bad ones, and SystemExit(0) after `--help`.

    Args:
        default: a config whose values the flags start from, instead of the class's own.
    """
    import tyro  # not at the top: `spotlight --help` is instant without it

    messages = io.StringIO()
    given = list(sys.argv[1:] if args is None else args)
    try:
        with contextlib.redirect_stderr(messages):
            options: dict[str, Any] = {} if default is None else {"default": default}
            if default is not None:  # of several kinds of a part, the default's alone has flags
                options["config"] = (tyro.conf.AvoidSubcommands,)
            cfg, unknown = tyro.cli(
                config_class, prog=prog, description=description, args=given, return_unknown_args=True, **options
            )
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        raise InputError(_explain(messages.getvalue())) from None
    if unknown:
        raise InputError(_explain_unknown(unknown[0], config_class))
    return cfg


# What ends a run after its step: Ctrl-C, `kill`, a terminal that is closed.
STOPPING = tuple(number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)))


@contextlib.contextmanager
def noted_signals(*numbers: int) -> Iterator[list[int]]:
    """Collect these signals in the list, for the block to end by; a second one does at once what it always did.

    One that is ignored, as `nohup` ignores SIGHUP, stays ignored.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    def note(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in numbers:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def insistent_interrupt(again_after: float = 1.0) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, and again until the block is left: libraries swallow some.

    asyncio takes over Ctrl-C and loses it where its task ends first, and what is raised while Python frees an object
    or runs a callback of C++ is only printed.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, again_after)
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    is_main = threading.current_thread() is threading.main_thread()  # else signals are somebody else's
    if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        if previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(prog: str, message: str) -> int:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _explain(box: str) -> str:
    """Return the message inside the box that tyro draws, on one line, with the nearest of the choices it names."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # a terminal's colours
    blocks: list[list[str]] = [[]]
    for line in box.splitlines():
        inner = line.strip("│| \t")
        if inner.startswith("╭") or not inner.strip("─-+╰╯"):
            blocks.append([])
        else:
            blocks[-1].append(inner)
    paragraphs = [" ".join(block) for block in blocks if block]
    if "╭" not in box:  # drawn in plain ASCII: the title is a paragraph of its own
        paragraphs = paragraphs[1:]
    message = paragraphs[0] if paragraphs else "these flags cannot be used; see --help"
    message = re.sub(r"^Error parsing ([A-Z]\w*: )?", "", message)  # a config class is no name a user knows
    choice = re.match(r"invalid choice '(.*?)' .*Expected one of [(\[{](.*)[)\]}]", message)
    if choice and (near := difflib.get_close_matches(choice[1], re.findall(r"'(.*?)'", choice[2]), n=1)):
        message += f" Did you mean '{near[0]}'?"
    return message


def _explain_unknown(argument: str, config_class: type) -> str:
    if not argument.startswith("-"):
        return f"'{argument}' follows no flag; see --help"
    flag = argument.partition("=")[0].replace("_", "-")
    known = {name.lstrip("-"): name for name in (*_flags(config_class, "--"), "--help")}  # dashes make nothing alike
    if flag in known.values():
        return f"'{argument}' does nothing with the other flags; --help behind them lists those that do"
    if flag.startswith("--no-") and "." in flag:  # a group's flag is turned off behind the group's name
        group, _, name = flag.removeprefix("--no-").rpartition(".")
        flag = f"--{group}.no-{name}"
    name = flag.lstrip("-")
    near = [name] if name in known else difflib.get_close_matches(name, known, n=1)
    return f"unknown flag '{argument}'; " + (f"did you mean '{known[near[0]]}'?" if near else "see --help")


def _flags(config_class: type, prefix: str, omits_prefixes: bool = False) -> list[str]:
    from tyro.conf import OmitArgPrefixes

    kinds, marked = typing.get_type_hints(config_class), typing.get_type_hints(config_class, include_extras=True)
    flags = []
    for field in dataclasses.fields(config_class):
        name = prefix + field.name.replace("_", "-")
        kind: Any = kinds[field.name]
        if is_config(kind):
            is_flat = omits_prefixes or OmitArgPrefixes in getattr(marked[field.name], "__metadata__", ())
            for each in classes_of(kind):
                flags += _flags(each, prefix if is_flat else f"{name}.", is_flat)
            continue
        flags.append(name)
        if kind is bool:
            flags.append(name.replace("--", "--no-", 1) if "." not in name else name.replace(".", ".no-", 1))
    return flags


def main(args: Sequence[str] | None = None) -> int:
    """Run the `spotlight` command: one word chooses what to do, and its module is imported only then."""
    given = list(sys.argv[1:] if args is None else args)
    commands = {name: (module, text) for name, module, text in _COMMANDS}
    if not given or given[0] in ("-h", "--help", "help"):
        return _show(_usage(commands))
    if given[0] == "--version":
        from importlib.metadata import version

        return _show(version("spotlight-jax"))
    evaluations = {name: entry for name, entry in commands.items() if name.startswith("eval ")}
    if given[0] == "eval" and given[1:2] in ([], ["-h"], ["--help"]):
        return _show(_usage(evaluations))
    words = 2 if given[0] == "eval" else 1
    name = " ".join(given[:words])
    if name not in commands:
        known = evaluations if words == 2 else commands
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7 if words == 2 else 0.5)
        hint = f"did you mean '{near[0]}'?" if near else "there are: " + ", ".join(known)
        return _fail("spotlight", f"there is no command '{name}'; {hint}")
    try:
        module = import_own(commands[name][0])
    except InputError as error:
        return _fail("spotlight", str(error))
    return module.command(given[words:])


def import_own(module: str) -> Any:
    """Import a module of ours, whatever else in the working folder or on the path is called `train` or `eval`."""
    top = module.partition(".")[0]
    there = sys.modules.get(top)
    if (
        there is not None
        and (_ROOT / top).is_dir()
        and str(_ROOT / top) not in map(str, getattr(there, "__path__", ()))
    ):
        where = getattr(there, "__file__", None) or "a package"
        raise InputError(f"another module called '{top}' was imported before ({where}); start spotlight without it")
    sys.path.insert(0, str(_ROOT))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(_ROOT))  # a program that imports us keeps its own path


def _show(text: str) -> int:
    """Print a text; returns the exit code, also where the output is closed or full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        _drop_stdout()
        return _fail("spotlight", f"cannot write to standard output: {error.strerror}")
    return 0


def _usage(commands: dict[str, tuple[str, str]]) -> str:
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in commands.items()]
    head = "usage: spotlight COMMAND [flags]\n\nLong-context decoding that reads only the cached tokens that matter.\n"
    return "\n".join([head, "commands:", *lines, "", "spotlight COMMAND --help explains a command's flags."])


if __name__ == "__main__":
    sys.exit(main())
