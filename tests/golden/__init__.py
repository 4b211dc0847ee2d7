"""Outputs recorded before the code was moved: what a refactor must leave as it is.

    python -m tests.golden                          # compare with what is recorded, each number within its rule
    python -m tests.golden --record [--file F]      # record anew, after a change that is meant to change outputs
    python -m tests.golden --exact --file F         # bit for bit

XLA's numbers differ between processors, versions and optimisation flags, so bits can only be compared on the machine
that recorded them. A refactor records `--file F` at the commit before it and compares `--exact --file F` after it. The
recording in the repository is for any machine: integers that follow from integers are exact, and numbers that follow
from floats are within the rules of `outputs.RULES`.
"""
