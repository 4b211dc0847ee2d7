"""Flags of the evaluations and what starts them; no JAX is imported before they are right, so `--help` is quick."""
