"""`python -m eval.speed`."""

import sys

from eval.speed import command

sys.exit(command())
