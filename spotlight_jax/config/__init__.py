"""What is asked for, as frozen dataclasses that check themselves; no JAX is imported, so that `--help` is quick."""
