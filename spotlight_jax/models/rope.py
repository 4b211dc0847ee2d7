"""Rotary position embedding: frequencies of every supported scaling, and the rotation itself.

Frequencies are computed from positions (no table of a fixed size), in float32. Pairs are split in halves, as in
Hugging Face's checkpoints: dimension `i` turns with dimension `i + head_dim // 2`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from spotlight_jax.models.config import RopeConfig

Angles = tuple[Float[Array, "batch len half"], Float[Array, "batch len half"]]


def rope_angles(
    positions: Int32[Array, "batch len"],
    head_dim: int,
    cfg: RopeConfig,
    rope_len: Int32[Array, "*sequences"] | int | None = None,
) -> Angles:
    """Return cosine and sine of every position's angles, times the scaling's attention factor.

    Args:
        positions: of the tokens in their sequence.
        head_dim: even.
        cfg: the scaling.
        rope_len: the length that `dynamic` scaling adapts to, one for all sequences or one each; other scalings do not
            read it. None means each sequence's highest position + 1, which is what one forward pass over whole
            sequences wants. A caller that caches keys passes the same value (the final length) to prefill and to every
            step, since a cached key keeps its angle.
    """
    if cfg.kind == "dynamic":
        lengths = positions.max(axis=1) + 1 if rope_len is None else jnp.asarray(rope_len, jnp.int32)
        lengths = jnp.broadcast_to(lengths, positions.shape[:1])
        frequencies, factor = _dynamic_frequencies(lengths, head_dim, cfg), 1.0
    else:
        fixed, factor = rope_frequencies(head_dim, cfg)
        frequencies = jnp.asarray(fixed)[None, :]
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[:, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Float[Array, "batch len heads head_dim"], angles: Angles) -> Float[Array, "batch len heads head_dim"]:
    """Rotate the heads of each token by its angles, in float32; the result has `x`'s dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def rope_frequencies(head_dim: int, cfg: RopeConfig) -> tuple[np.ndarray, float]:
    """Return each pair's angle per position, float32 `[head_dim // 2]`, and the factor on cosine and sine.

    Raises ValueError for `dynamic`, whose frequencies depend on the length.
    """
    plain: np.ndarray = 1.0 / np.float32(cfg.theta) ** _exponents(head_dim)
    frequencies: np.ndarray
    if cfg.kind == "default":
        frequencies, factor = plain, 1.0
    elif cfg.kind == "linear":
        frequencies, factor = plain / np.float32(cfg.factor), 1.0
    elif cfg.kind == "llama3":
        frequencies, factor = _llama3_frequencies(plain, cfg), 1.0
    elif cfg.kind == "yarn":
        frequencies, factor = _yarn_frequencies(plain, head_dim, cfg), _yarn_attention_factor(cfg)
    else:
        raise ValueError(f"frequencies of RoPE scaling {cfg.kind!r} are not fixed")
    if cfg.divisors is not None:
        frequencies = frequencies / np.asarray(cfg.divisors, np.float32)
    return frequencies.astype(np.float32), factor


def _exponents(head_dim: int) -> np.ndarray:
    """Return 2i / head_dim for each pair i: its frequency is theta to the negative of it."""
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _dynamic_frequencies(lengths: Int32[Array, "batch"], head_dim: int, cfg: RopeConfig) -> Float[Array, "batch half"]:
    """Return NTK-aware frequencies: past the trained length the base grows with the length."""
    trained = cfg.trained_len
    grown = cfg.factor * jnp.maximum(lengths, trained).astype(jnp.float32) / trained - (cfg.factor - 1)
    theta = cfg.theta * grown ** (head_dim / (head_dim - 2))
    return 1.0 / theta[:, None] ** _exponents(head_dim)[None, :]


def _llama3_frequencies(plain: np.ndarray, cfg: RopeConfig) -> np.ndarray:
    """Return LLaMA 3.1's frequencies: long waves slowed by `factor`, short ones kept, blends in 1 / wave between."""
    turns = cfg.trained_len * plain / (2 * math.pi)  # full turns within the trained length
    blend = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * plain / cfg.factor + blend * plain


def _yarn_frequencies(plain: np.ndarray, head_dim: int, cfg: RopeConfig) -> np.ndarray:
    """Return YaRN's frequencies (arXiv 2309.00071, section 3.2): pairs with fewer than `beta_slow` turns interpolated
    by `factor`, those with more than `beta_fast` kept, and a ramp over the pair's index joins the two."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(cfg.trained_len / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))

    low, high = pair_with_turns(cfg.beta_fast), pair_with_turns(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return plain / cfg.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(cfg: RopeConfig) -> float:
    """Return the stretch of cosine and sine that keeps attention's entropy (arXiv 2309.00071, equation 22)."""
    if cfg.attention_factor is not None:
        return cfg.attention_factor

    def stretch(weight: float) -> float:
        return 1.0 if cfg.factor <= 1 else 0.1 * weight * math.log(cfg.factor) + 1.0

    if cfg.mscale and cfg.mscale_all_dim:
        return stretch(cfg.mscale) / stretch(cfg.mscale_all_dim)
    return stretch(1.0)
