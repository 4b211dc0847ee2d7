"""Hostile files for every input format: whatever they hold, reading ends in a value or in one line, soon and small.

    python -m tests.fuzz --target gguf --cases 20000
    python -m tests.fuzz --target gguf --first 1234 --cases 1 --keep /tmp/case    # one case again, its files kept

A target is a row of `tests/fuzz/targets.py`: how a case is written, and how the product reads it. `make slow` runs 200
cases of each.
"""
