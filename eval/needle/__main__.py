"""`python -m eval.needle`."""

import sys

from eval.needle import command

sys.exit(command())
