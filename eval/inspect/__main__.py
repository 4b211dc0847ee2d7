"""`python -m eval.inspect`."""

import sys

from eval.inspect import command

sys.exit(command())
