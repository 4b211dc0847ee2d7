"""Evaluation: `python -m eval.<name>`."""

import spotlight_jax.models  # noqa: F401  first, so that transformers does not tell every user that torch is missing
