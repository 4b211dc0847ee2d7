"""The next token from logits: greedy, or drawn at a temperature from the most probable tokens."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError

NOT_FINITE = -1  # stands for a token where the logits have none to choose
MOST_LOGPROBS = 20  # most probable tokens whose log-probabilities can be asked for


@flax.struct.dataclass
class Sampling:
    """Settings for drawing the next token, as arrays; see `SamplingConfig`. One compiled step serves all of them."""

    temperature: Float[Array, "batch"]
    top_k: Int32[Array, "batch"]
    top_p: Float[Array, "batch"]
    seed: Int32[Array, "batch"]
    number: Int32[Array, "batch"]  # of each sequence among those of its seed, which draw apart


@flax.struct.dataclass
class TokenLogprobs:
    """Natural logarithms of probabilities, by the softmax of the logits as the model gives them.

    Neither temperature nor top-k nor top-p is in them, so that they say what the model holds, not how it is drawn from.
    """

    chosen: Float[Array | np.ndarray, "batch *steps"]
    top: Float[Array | np.ndarray, "batch *steps most"]  # of the most probable tokens, the highest first
    top_tokens: Int32[Array | np.ndarray, "batch *steps most"]


def empty_logprobs(shape: tuple[int, ...], vocab: int) -> TokenLogprobs:
    """Return zeros for so many sequences, or sequences and steps."""
    wide = (*shape, min(MOST_LOGPROBS, vocab))
    return TokenLogprobs(jnp.zeros(shape), jnp.zeros(wide), jnp.zeros(wide, jnp.int32))


def token_logprobs(logits: Float[Array, "batch vocab"], tokens: Int32[Array, "batch"]) -> TokenLogprobs:
    """Return log-probabilities of the chosen tokens and of the `MOST_LOGPROBS` most probable ones."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_tokens = lax.top_k(logits, min(MOST_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)
    return TokenLogprobs((chosen - total)[:, 0], top - total, top_tokens.astype(jnp.int32))


def batch_sampling(configs: Sequence[SamplingConfig], numbers: Sequence[int]) -> Sampling:
    """Return the settings of some sequences as arrays.

    Args:
        configs: one for each sequence.
        numbers: of each sequence among those of its seed.
    """
    seeds = np.asarray([cfg.seed for cfg in configs], np.int64).astype(np.int32)  # the bits that JAX keeps of a seed
    return Sampling(
        temperature=jnp.asarray([cfg.temperature for cfg in configs], jnp.float32),
        top_k=jnp.asarray([cfg.top_k for cfg in configs], jnp.int32),
        top_p=jnp.asarray([cfg.top_p for cfg in configs], jnp.float32),
        seed=jnp.asarray(seeds),
        number=jnp.asarray(numbers, jnp.int32),
    )


def keep_top_k(logits: Float[Array, "batch vocab"], top_k: Int32[Array, "batch"]) -> Float[Array, "batch vocab"]:
    """Mask all but the `top_k` highest of each row, and those that tie with the last; 0 masks none.

    The last one is found by bisection on the float32 bits: floats are ordered as their bits are, once those of
    negative ones are turned round.
    """
    count = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits).astype(jnp.float32), jnp.uint32)  # no -0
    ranks = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def raise_bound(step: Array, bound: Array) -> Array:
        raised = bound | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        held = jnp.sum(ranks >= raised[:, None], axis=-1)
        return jnp.where(held >= count, raised, bound)

    bound = lax.fori_loop(0, 32, raise_bound, jnp.zeros(logits.shape[:1], jnp.uint32))
    return jnp.where(ranks >= bound[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "batch vocab"], top_p: Float[Array, "batch"]) -> Float[Array, "batch vocab"]:
    """Mask all but the most probable tokens of each row that together hold `top_p`; ties with the last are kept, and 1
    masks none.

    The least probability kept is found by bisection on its float32 bits, not by sorting the vocabulary.
    """
    shares = jax.nn.softmax(logits, axis=-1)

    def raise_bound(step: Array, bound: Array) -> Array:
        raised = bound + (jnp.int32(1 << 29) >> step)  # bits of floats in [0, 1] are in their order, and below 2^30
        floor = lax.bitcast_convert_type(raised, jnp.float32)[:, None]
        held = jnp.sum(jnp.where(shares >= floor, shares, 0.0), axis=-1)
        return jnp.where(held >= top_p, raised, bound)

    bound = lax.fori_loop(0, 30, raise_bound, jnp.zeros(logits.shape[:1], jnp.int32))
    floor = lax.bitcast_convert_type(bound, jnp.float32)[:, None]
    return jnp.where((shares >= floor) | (top_p >= 1)[:, None], logits, -jnp.inf)


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, draws: Int32[Array, "batch"]
) -> Int32[Array, "batch"]:
    """Draw one token per sequence; `NOT_FINITE` for a sequence whose logits hold NaN, or no finite maximum.

    Args:
        logits: of the next token.
        sampling: how; where no sequence has a temperature, nothing is drawn.
        draws: each sequence's number of this draw.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_drawn = sampling.temperature > 0
    drawn = lax.cond(jnp.any(is_drawn), lambda: _draw(logits, sampling, draws), lambda: best)
    return _or_not_finite(jnp.where(is_drawn, drawn, best), logits)


def pick_best(logits: Float[Array, "batch vocab"]) -> Int32[Array, "batch"]:
    """Return the most probable token of each sequence; `NOT_FINITE` where logits hold NaN, or no finite maximum."""
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


def _draw(
    logits: Float[Array, "batch vocab"], sampling: Sampling, draws: Int32[Array, "batch"]
) -> Int32[Array, "batch"]:
    """Draw one token per sequence, at its temperature and from its most probable ones."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    logits = logits.astype(jnp.float32) / temperature[:, None]
    is_cut = jnp.any((sampling.top_k > 0) & (sampling.top_k < logits.shape[-1]))
    logits = lax.cond(is_cut, lambda: keep_top_k(logits, sampling.top_k), lambda: logits)
    logits = lax.cond(jnp.any(sampling.top_p < 1), lambda: keep_top_p(logits, sampling.top_p), lambda: logits)
    keys = jax.vmap(jax.random.key)(sampling.seed)
    for part in (sampling.number, draws):
        keys = jax.vmap(jax.random.fold_in)(keys, part)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
