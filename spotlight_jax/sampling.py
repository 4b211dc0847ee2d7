"""The next token from logits: greedy, or drawn at a temperature from the most probable tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError

NOT_FINITE = -1  # stands for a token where the logits have none to choose


def keep_top_p(logits: Float[Array, "batch vocab"], top_p: float) -> Float[Array, "batch vocab"]:
    """Mask all but the most probable tokens that together hold `top_p`; ties with the last are kept.

    The least probability kept is found by bisection on its float32 bits, not by sorting the vocabulary.
    """
    shares = jax.nn.softmax(logits, axis=-1)
    bound = jnp.zeros(logits.shape[:1], jnp.int32)
    for shift in reversed(range(30)):  # floats in [0, 1] are ordered as their bits, which stay below 2^30
        raised = bound + (1 << shift)
        floor = lax.bitcast_convert_type(raised, jnp.float32)[:, None]
        held = jnp.sum(jnp.where(shares >= floor, shares, 0.0), axis=-1)
        bound = jnp.where(held >= top_p, raised, bound)
    floor = lax.bitcast_convert_type(bound, jnp.float32)[:, None]
    return jnp.where(shares >= floor, logits, -jnp.inf)


def sample(
    logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"], cfg: SamplingConfig
) -> Int32[Array, "batch"]:
    """One token per sequence; `NOT_FINITE` for a sequence whose logits hold NaN, or no finite maximum.

    Args:
        logits: of the next token.
        keys: one PRNG key per sequence; not used by greedy decoding.
        cfg: how.
    """
    return pick_best(logits) if cfg.temperature == 0 else _or_not_finite(_draw(logits, keys, cfg), logits)


def pick_best(logits: Float[Array, "batch vocab"]) -> Int32[Array, "batch"]:
    """The most probable token of each sequence; `NOT_FINITE` where the logits hold NaN, or no finite maximum."""
    return _or_not_finite(jnp.argmax(logits, axis=-1).astype(jnp.int32), logits)


def _or_not_finite(tokens: Int32[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Int32[Array, "batch"]:
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, NOT_FINITE)  # the maximum with NaN is NaN


def check_chosen(tokens: np.ndarray) -> None:
    """Raise InputError where a token was to be chosen by logits that are not finite."""
    if np.any(tokens == NOT_FINITE):
        raise InputError(
            "the model's logits are not finite (NaN or Inf): its weights cannot be used, or their dtype is too narrow; "
            "try --dtype float32, or fetch the model again"
        )


def _draw(logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"], cfg: SamplingConfig) -> Int32[Array, "batch"]:
    """One token per sequence, at the temperature and from the most probable ones."""
    logits = logits.astype(jnp.float32) / cfg.temperature
    if 0 < cfg.top_k < logits.shape[-1]:
        least = lax.top_k(logits, cfg.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if cfg.top_p < 1:
        logits = keep_top_p(logits, cfg.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
