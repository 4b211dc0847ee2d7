"""`python -m eval.longbench`."""

import sys

from eval.longbench import command

sys.exit(command())
