"""Run cases of one target: `python -m tests.fuzz --target gguf --cases 20000`; exits with 1 where one fails."""

import argparse
import collections
import contextlib
import faulthandler
import io
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np

from spotlight_jax.errors import InputError
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

SECONDS = 20  # of one case; longer is a hang, and ends the run with a traceback
MEMORY = 2 << 30  # bytes that a run may take on top of what it starts with
_SHOWN = 20  # kinds of failures shown with a traceback


def run_case(name: str, target: Target, number: int, folder: Path) -> str:
    """Write and read one case. Returns "read" or "refused"; raises what is neither."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    path = target.write(rng, folder)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        target.read(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable(), f"the message is not one printable line: {message!r}"
        return "refused"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "read"


def _limit_memory() -> None:
    """From here on, an allocation past the bound fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def run(name: str, first: int, cases: int, keep: Path | None) -> int:
    """Run cases and say how each kind of failure looks; returns how many failed."""
    counts: collections.Counter[str] = collections.Counter()
    kinds: dict[str, int] = {}
    faulthandler.enable()
    _limit_memory()
    for number in range(first, first + cases):
        if number % 100 == 0:
            sys.stderr.write(f"\r{name} {number} ")  # about where a crash of the whole process was
        folder = keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counts[run_case(name, TARGETS[name], number, folder)] += 1
        except BaseException as error:  # whatever it is: a library's panic is none of Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            counts["failed"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] == 1 and len(kinds) <= _SHOWN:
                sys.stderr.write(f"\ncase {number} failed: {kind}\n{''.join(traceback.format_exception(error))}\n")
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)
    sys.stderr.write("\n")
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{count:6} x {kind}")
    print(f"{name}: {cases} cases, {counts['read']} read, {counts['refused']} refused, {counts['failed']} failed")
    return counts["failed"]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case; a number is always one case")
    parser.add_argument("--keep", type=Path, help="folder in which to leave the files of the last case")
    args = parser.parse_args()
    return 1 if run(args.target, args.first, args.cases, args.keep) else 0


if __name__ == "__main__":
    sys.exit(main())
