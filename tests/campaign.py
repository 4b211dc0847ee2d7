"""Ends training runs at random file operations, damages their checkpoints, lets their disk fail, and resumes them.

    python -m tests.campaign --kills 300 --damages 300 --errors 100

A run must come to the hash functions of the run that nothing happened to, bit for bit, or be refused in one line where
nothing whole is left. All runs are in this process, on a tiny model: an audit hook sees each file operation of Python
in the run's folder before it happens. Killed means that this operation and all later ones do not happen, and that what
was not yet on the disk is cut. Prints a table of outcomes; exit code 1 where a result was wrong in silence, something
was lost, an exception was not ours, or a run hung.
"""

import argparse
import collections
import contextlib
import errno
import faulthandler
import io
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from tests.models import tiny
from tests.train.conftest import LAYERS, STEPS, Inputs
from train import layerwise, loop

_HANGS = 120  # seconds that no run takes
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
GOOD = ("equal", "refused in one line")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Disk:
    """What happens to the file operations in one folder: nothing, the end at one of them, or an error."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = str(folder)
        self._real_fsync = os.fsync
        self.calm()
        sys.addaudithook(self._see)  # for the life of this process

    def calm(self) -> None:
        """Let everything happen."""
        self.count, self._at, self._happen = 0, -1, lambda: None
        self._lasts = False

    def plan(self, at: int, happen: Callable[[], None], lasts: bool) -> None:
        """Call `happen`, which raises, at one operation, and at all after it where it lasts."""
        self.count, self._at, self._happen, self._lasts = 0, at, happen, lasts

    def _see(self, event: str, args: tuple) -> None:
        if event in _EVENTS and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(self._folder):
            is_read = event == "open" and args[1] is not None and not set("wax+") & set(args[1])
            if not is_read:
                self._pass()

    def _pass(self) -> None:
        self.count += 1
        if self.count == self._at or (self._lasts and self.count > self._at >= 0):
            self._happen()

    def fsync(self, descriptor: int) -> None:
        """Take the place of `os.fsync`: what was written and is not synced may be cut."""
        try:
            self._pass()
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise
        self._real_fsync(descriptor)


class Campaign:
    """A reference run, one that was stopped, and what others come to."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        config = tiny.CASES["llama3"] | {"num_hidden_layers": LAYERS, "max_position_embeddings": 256}
        tiny.write_folder(folder / "model", config)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, tiny.VOCAB, 2000).astype(np.uint16))
        self.inputs = Inputs(folder / "model", folder / "tokens.npy")
        (folder / "runs").mkdir()
        self.disk = Disk(folder / "runs")
        self._run(self.inputs.flags(folder / "runs" / "reference"))
        self.expected = self._params(folder / "runs" / "reference")
        self.operations = 0  # of a whole run

    def _run(self, flags: list[str]) -> tuple[str, str]:
        """What a command comes to, and its last line on stderr."""
        faulthandler.dump_traceback_later(_HANGS, exit=True)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code: object = layerwise.command(flags)
        except Killed:
            code = "killed"
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = f"foreign: {type(error).__name__}: {str(error)[:120]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        if "Traceback" in told.getvalue():
            code = f"foreign: traceback on stderr after {code}"
        return str(code), (told.getvalue().splitlines() or [""])[-1]

    def _params(self, path: pathlib.Path) -> dict[str, np.ndarray]:
        return load_file(path / "selector" / "selector.safetensors")

    def _settle(self, path: pathlib.Path) -> str:
        """Resume a run on a calm disk, or start it where it had not begun, and compare what it comes to."""
        self.disk.calm()
        code, told = self._run(["--resume", "--out", str(path)])
        if code == "2" and "is no run folder" in told:
            code, told = self._run(self.inputs.flags(path))
        if code == "2":
            return f"refused: {told[:150]}"
        return self._compare(path) if code == "0" else code

    def _compare(self, path: pathlib.Path) -> str:
        params = self._params(path)
        is_equal = params.keys() == self.expected.keys() and all(
            np.array_equal(params[name], self.expected[name]) for name in params
        )
        steps = [row["step"] for row in loop.runs.RunFolder(path).metrics() if "loss" in row]
        if steps != list(range(1, STEPS + 1)):
            return "wrong: rows of metrics are lost or double"
        return "equal" if is_equal else "wrong: other hash functions in silence"

    @contextlib.contextmanager
    def _path(self) -> Iterator[pathlib.Path]:
        path = self.folder / "runs" / "run"
        self.disk.calm()
        shutil.rmtree(path, ignore_errors=True)
        yield path

    def kill(self) -> str:
        """End a run at one operation, its resumption sometimes at another, then resume it."""

        def die() -> None:
            raise Killed

        with self._path() as path:
            self.disk.plan(self.random.randint(1, self.operations), die, lasts=True)
            self._run(self.inputs.flags(path))
            if self.random.random() < 0.3:
                self.disk.plan(self.random.randint(1, self.operations), die, lasts=True)
                self._run(["--resume", "--out", str(path)])
            self.disk.calm()
            self._cut_last_line(path / "metrics.jsonl")
            return self._settle(path)

    def _cut_last_line(self, file: pathlib.Path) -> None:
        """A line of metrics may be cut as the process ends."""
        if file.exists() and self.random.random() < 0.5 and not (file.parent / "summary.json").exists():
            with file.open("a") as lines:
                lines.write('{"step": 3, "lo')

    def damage(self) -> str:
        """Damage a file of the newest checkpoint, sometimes of all; the newest sound one must be continued."""
        with self._path() as path:
            shutil.copytree(self.folder / "runs" / "reference", path)
            shutil.rmtree(path / "selector")
            is_all = self.random.random() < 0.1
            steps = sorted((path / "checkpoints").iterdir(), key=lambda step: int(step.name))
            for step in steps if is_all else steps[-1:]:
                self._damage_file(self.random.choice(sorted(step.iterdir())))
            outcome = self._settle(path)
            if is_all and outcome.startswith("refused: train.layerwise: checkpoint"):
                return "refused in one line"
            return outcome

    def _damage_file(self, file: pathlib.Path) -> None:
        content = bytearray(file.read_bytes())
        at = self.random.randrange(len(content))
        kind = self.random.choice(["bit", "cut", "zeros", "gone", "longer"])
        if kind == "gone":
            file.unlink()
            return
        if kind == "bit":
            content[at] ^= 1 << self.random.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "zeros":
            content[at:] = bytes(len(content) - at)
        else:
            content += content[:20]
        file.write_bytes(content)

    def fail(self) -> str:
        """Let the disk fail at one operation, or from one on: one line and exit code 2, then resume on a calm disk."""
        code = self.random.choice(_ERRORS)

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        with self._path() as path:
            self.disk.plan(self.random.randint(1, self.operations), fail, lasts=self.random.random() < 0.5)
            ended, told = self._run(self.inputs.flags(path))
            if ended not in ("0", "2"):
                return ended
            if ended == "2" and not told.startswith("train.layerwise: "):
                return f"wrong: the last line is {told[:120]!r}"
            self.disk.calm()
            return self._compare(path) if ended == "0" else self._settle(path)

    def repeat(self, name: str, once: Callable[[], str], count: int) -> None:
        """Do one kind many times, and count what it came to."""
        for number in range(1, count + 1):
            self.counts[name, once()] += 1
            if number % 25 == 0:
                print(f"{number} of {count} {name}, {self.bad} bad so far", file=sys.stderr, flush=True)

    @property
    def bad(self) -> int:
        """How many came to what they must not."""
        return sum(count for (_, outcome), count in self.counts.items() if outcome not in GOOD)


def run(folder: pathlib.Path, kills: int, damages: int, errors: int, seed: int) -> Campaign:
    """A whole campaign in an empty folder."""
    with mock.patch.object(loop, "use_compile_cache", lambda: None):
        campaign = Campaign(folder, seed)
        with mock.patch.object(os, "fsync", campaign.disk.fsync):
            campaign.disk.calm()
            campaign._run(campaign.inputs.flags(folder / "runs" / "counted"))
            campaign.operations = campaign.disk.count
            campaign.repeat("kills", campaign.kill, kills)
            campaign.repeat("damaged checkpoints", campaign.damage, damages)
            campaign.repeat("I/O errors", campaign.fail, errors)
    return campaign


def main() -> int:
    """Flags, a campaign, its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, count in (("kills", 300), ("damages", 300), ("errors", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run(pathlib.Path(folder), flags.kills, flags.damages, flags.errors, flags.seed)
    for (name, outcome), count in sorted(campaign.counts.items()):
        print(f"{count:5}  {name}: {outcome}")
    return int(campaign.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
