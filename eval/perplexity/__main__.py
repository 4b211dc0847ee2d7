"""`python -m eval.perplexity`."""

import sys

from eval.perplexity import command

sys.exit(command())
