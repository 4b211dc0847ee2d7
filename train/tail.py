"""Corrections of the tail's estimate, trained to the output error of each query head after its hash functions are.

What a head reads and the moments of what it does not read are known for some queries of a few windows and several
budgets. The output is a sum of three vectors, so its error is a quadratic form in how much of each there is: fourteen
numbers a query are enough to train the corrections of a head (`tail.TailParams`), and a step costs next to nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from spotlight_jax.attention import causal_attention, grouped_logits, spread_heads
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.models.decoder import Attend, embed_tokens
from spotlight_jax.models.runner import run_layers
from spotlight_jax.moments import with_newest
from spotlight_jax.selector.base import HashFunctions
from spotlight_jax.selector.scoring import hash_score_range, hash_scores
from spotlight_jax.selector.selection import select_mask
from spotlight_jax.tail import LogitMoments, TailParams, init_tail, mass_and_slope, split_by_logits
from train.config import TailConfig
from train.data import Inputs
from train.processes import fetch, localize

KEEPS = (0.0025, 0.005, 0.02, 0.1)  # shares of tokens read: one set of corrections serves all budgets


@flax.struct.dataclass
class Rows:
    """What the error of a query head's output depends on, for some queries and budgets.

    r, u and c are what was read less the dense output, the mean value less the dense output, and the covariance of
    values with logits.
    """

    log_read: Float[Array, "rows kv_heads group"]
    highest: Float[Array, "rows kv_heads group"]
    whole: LogitMoments
    unread: LogitMoments
    products: Float[Array, "rows kv_heads group six"]  # rr, ru, rc, uu, uc, cc, over the dense output's square


@flax.struct.dataclass
class Examined:
    """Dense attention that also gives back the `Rows` of some queries, one budget after another."""

    functions: HashFunctions  # of one layer
    places: Int32[Array, "picks"]
    per_kv_head: bool = flax.struct.field(pytree_node=False, default=True)

    def __call__(self, queries: Array, keys: Array, values: Array) -> tuple[Array, Rows]:
        """See `Attend`; of one sequence."""
        outputs = causal_attention(queries, keys, values)
        picked, at = queries[:, self.places], self.places[None]
        q_heads, kv_heads, head_dim = queries.shape[2], *keys.shape[2:]
        logits = grouped_logits(picked, keys)
        dense = outputs[:, self.places].reshape(1, -1, kv_heads, q_heads // kv_heads, head_dim).astype(jnp.float32)
        scores = hash_scores(self.functions, picked, self.functions.key_codes(keys), self.per_kv_head)
        bounds = hash_score_range(self.functions, q_heads // kv_heads, self.per_kv_head)
        selection = SelectionConfig(per="kv_head" if self.per_kv_head else "query_head", dense_layers=())

        def examine(keep: float) -> Rows:
            mask = with_newest(select_mask(scores, at, dataclasses.replace(selection, keep=keep), bounds), at)
            split = split_by_logits(logits, spread_heads(mask, q_heads, kv_heads), values, at)
            vectors = split.read - dense, split.values.mean - dense, split.values.covariance
            pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
            products = jnp.stack([jnp.sum(vectors[i] * vectors[j], axis=-1) for i, j in pairs], axis=-1)
            size = jnp.maximum(jnp.sum(dense * dense, axis=-1), 1e-9)
            found = split.log_read, split.highest, split.whole, split.unread, products / size[..., None]
            return Rows(*jax.tree.map(lambda leaf: leaf[0], found))

        return outputs, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *map(examine, KEEPS))


def output_error(rows: Rows, params: TailParams) -> Float[Array, "rows kv_heads group"]:
    """Return the squared error of each output with the tail, relative to the dense output's square."""
    log_mass, slope = mass_and_slope(rows.whole, rows.unread, rows.highest, params.grouped(rows.highest.shape[1]))
    share = jax.nn.sigmoid(log_mass - rows.log_read)
    rr, ru, rc, uu, uc, cc = jnp.moveaxis(rows.products, -1, 0)
    read = 1 - share
    return read**2 * rr + 2 * read * share * (ru + slope * rc) + share**2 * (uu + 2 * slope * uc + slope**2 * cc)


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def fit_layer(
    rows: Rows, steps: int, rate: float
) -> tuple[TailParams, Float[Array, "two q_heads"], Float[Array, " steps"]]:
    """Return a layer's corrections; each head's mean error without the tail and with it; the mean error by step.

    The gate of a head that the tail does not help is closed.
    """
    q_heads = rows.highest.shape[1] * rows.highest.shape[2]
    start = jax.tree.map(lambda leaf: leaf[0], init_tail(1, q_heads))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss_of(params: TailParams) -> Array:
        return output_error(rows, params).mean(axis=0).sum()

    def step(carry: tuple[TailParams, optax.OptState], _: None) -> tuple[tuple[TailParams, optax.OptState], Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads.replace(gate=jnp.zeros((q_heads,))), state, params)
        return (optax.apply_updates(params, updates), state), loss / q_heads

    (params, _), curve = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    before = output_error(rows, params.replace(gate=jnp.zeros((q_heads,)))).mean(axis=0).reshape(-1)
    after = output_error(rows, params).mean(axis=0).reshape(-1)
    is_finite = jnp.stack([jnp.isfinite(leaf.reshape(q_heads, -1)).all(axis=1) for leaf in jax.tree.leaves(params)])
    helps = (after < before) & is_finite.all(axis=0)
    kept = jax.tree.map(lambda new, old: jnp.where(helps.reshape(-1, *[1] * (new.ndim - 1)), new, old), params, start)
    return kept.replace(gate=helps.astype(jnp.float32)), jnp.stack([before, jnp.where(helps, after, before)]), curve


def fit_tail(
    inputs: Inputs, functions: HashFunctions, place: int, first: int, cfg: TailConfig
) -> Iterator[tuple[TailParams, Float[np.ndarray, "two q_heads"], Float[np.ndarray, " steps"]]]:
    """Yield each layer's corrections, errors and curve, as `fit_layer`.

    Windows go through the model side by side, layer by layer, so that one layer's rows are held at a time.

    Args:
        inputs: of the run.
        functions: of all layers.
        place: which of the run's lengths they are for: windows are placed below it.
        first: number of the first window.
    """
    plan = inputs.plan
    tokens, positions = inputs.feed.tokens(first, cfg.windows), inputs.feed.positions(first, cfg.windows)[place]
    window, per_kv_head = tokens.shape[1], plan.cfg.measure.per == "kv_head"
    rng = np.random.default_rng((plan.cfg.seed, plan.lengths[place]))
    count = min(cfg.queries, window - 1)
    picks = [jnp.asarray(np.sort(1 + rng.permutation(window - 1)[:count]), jnp.int32) for _ in tokens]

    def pass_window(row: int) -> Iterator[tuple[Array, Rows]]:
        def attend_of(layer: int) -> Attend:
            return Examined(functions.layer(layer), picks[row], per_kv_head)

        ids, at = tokens[row : row + 1], jnp.asarray(positions[row : row + 1])
        table = inputs.params["embed"]["table"]  # on the host where weights stay there
        is_on_host = isinstance(table, np.ndarray)
        x = jnp.asarray(table[ids]) if is_on_host else embed_tokens(inputs.params, jnp.asarray(ids), plan.model)
        return run_layers(inputs.params, x, at, attend_of, plan.model)

    for passed in zip(*map(pass_window, range(len(tokens))), strict=True):
        rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(rows for _, rows in passed))
        params, errors, curve = fit_layer(rows, cfg.steps, cfg.learning_rate)
        yield localize(params), fetch(errors), fetch(curve)
