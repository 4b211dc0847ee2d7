"""200 hostile files of every format, each target in a process of its own with bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_hostile_files_are_read_or_refused_in_one_line_soon_and_small(name):
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--cases", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "200 cases" in done.stdout and " 0 failed" in done.stdout
