"""Evaluation: `python -m eval.<name>`."""
