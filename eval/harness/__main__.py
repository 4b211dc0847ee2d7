"""`python -m eval.harness`."""

import sys

from eval.harness import command

sys.exit(command())
