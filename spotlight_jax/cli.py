"""Commands: flags to a frozen dataclass, bad input to one line and exit code 2, and the `spotlight` command."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import importlib.util
import io
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spotlight_jax.errors import InputError

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
    ("chat", "spotlight_jax.commands.chat", "talk with a model"),
    ("doctor", "spotlight_jax.commands.doctor", "check this machine and installation"),
)


def run(
    main: Callable[[Config], object],
    config_class: type[Config],
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
    default: Config | None = None,
) -> int:
    """Parse flags into a config, call `main` with it, and return the exit code.

    0: done; 2: the input cannot be used or the disk fails, which one line on stderr explains; 130: interrupted; 141:
    who reads our output wants no more (`| head`). Any other exception is our bug and keeps its traceback. Flags and
    their help come from the config's fields and the docstrings under them.
    """
    try:
        try:
            main(parse(config_class, prog, description, args, default))
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
    """Flags to a config; raises InputError for bad ones, and SystemExit(0) after `--help`.

    Args:
        default: a config whose values the flags start from, instead of the class's own.
    """
    import tyro  # not at the top: `spotlight --help` is instant without it

    messages = io.StringIO()
    given = list(sys.argv[1:] if args is None else args)
    try:
        with contextlib.redirect_stderr(messages):
            options: dict[str, Any] = {} if default is None else {"default": default}
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
    """These signals end what is under way by being in the list; a second one does what it always did, at once.

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
    """Ctrl-C raises KeyboardInterrupt, and does so again until the block is left: libraries swallow some.

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
    """The message inside the box that tyro draws, on one line, with the nearest of the choices it names."""
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
    near = difflib.get_close_matches(flag, [*_flags(config_class, "--"), "--help"], n=1)
    return f"unknown flag '{argument}'; " + (f"did you mean '{near[0]}'?" if near else "see --help")


def _flags(config_class: type, prefix: str, omits_prefixes: bool = False) -> list[str]:
    from tyro.conf import OmitArgPrefixes

    kinds, marked = typing.get_type_hints(config_class), typing.get_type_hints(config_class, include_extras=True)
    flags = []
    for field in dataclasses.fields(config_class):
        name = prefix + field.name.replace("_", "-")
        kind: Any = kinds[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            is_flat = omits_prefixes or OmitArgPrefixes in getattr(marked[field.name], "__metadata__", ())
            flags += _flags(kind, prefix if is_flat else f"{name}.", is_flat)
            continue
        flags.append(name)
        if kind is bool:
            flags.append(name.replace("--", "--no-", 1) if "." not in name else name.replace(".", ".no-", 1))
    return flags


def main(args: Sequence[str] | None = None) -> int:
    """The `spotlight` command: one word chooses what to do, its module is imported only then."""
    given = list(sys.argv[1:] if args is None else args)
    commands = {name: (module, text) for name, module, text in _COMMANDS if _exists(module)}
    commands |= {f"eval {name}": (f"eval.{name}", text) for name, text in _evaluations()}
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage(commands))
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("spotlight-jax"))
        return 0
    words = 2 if given[0] == "eval" else 1
    name = " ".join(given[:words])
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "there are: " + ", ".join(commands)
        return _fail("spotlight", f"there is no command '{name}'; {hint}")
    return importlib.import_module(commands[name][0]).command(given[words:])


def _usage(commands: dict[str, tuple[str, str]]) -> str:
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in commands.items()]
    head = "usage: spotlight COMMAND [flags]\n\nLong-context decoding that reads only the cached tokens that matter.\n"
    return "\n".join([head, "commands:", *lines, "", "spotlight COMMAND --help explains a command's flags."])


def _exists(module: str) -> bool:
    """Whether the module is there and is a command; it is not imported, since JAX takes seconds."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None and "\ndef command(" in Path(spec.origin).read_text()


def _evaluations() -> list[tuple[str, str]]:
    """Every command in `eval/` with the first line of its docstring."""
    spec = importlib.util.find_spec("eval")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    names = sorted(Path(file).stem for folder in folders for file in os.listdir(folder) if file.endswith(".py"))
    found = []
    for name in names:
        if _exists(f"eval.{name}"):
            source = Path(importlib.util.find_spec(f"eval.{name}").origin).read_text()  # type: ignore[union-attr,arg-type]
            head = re.match(r'\s*[rR]?"""(.*?)(?:"""|\n)', source)
            found.append((name, head[1] if head else ""))
    return found


if __name__ == "__main__":
    sys.exit(main())
