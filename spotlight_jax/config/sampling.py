"""How the next token is drawn."""

import dataclasses

from spotlight_jax.errors import InputError, check_numbers

LEAST_TEMPERATURE = 1e-6  # below it logits divided by it pass float32's range


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings for drawing the next token."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from this many most probable tokens (and those that tie with the last); 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that hold this much probability."""
    seed: int = 0
    """Seed of the draws; the same seed, prompts and settings give the same tokens."""

    def __post_init__(self) -> None:
        """Refuse what no distribution fits."""
        check_numbers(self)
        if not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE):
            raise InputError(
                f"temperature is {self.temperature}; give 0 (the most probable token) or at least {LEAST_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give a probability above 0 and at most 1")
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1):
            raise InputError("top_k and top_p say what is drawn from, and at temperature 0 nothing is drawn; raise it")
