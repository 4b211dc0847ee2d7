"""`python -m eval.report`."""

import sys

from eval.report import command

sys.exit(command())
