"""A tiny model's scorer, and what the plain decoder says of a request."""

import jax.numpy as jnp
import numpy as np

from eval.common.cases import EvalCase
from eval.harness.scorer import Scorer
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.models.runner import forward

MODEL = PRESETS["tiny"]
SELECTION = SelectionConfig(keep=0.1, min_tokens=4, min_context=0, dense_layers=(0,))


def scorer(model, method, selection=SELECTION, batch=1):
    return Scorer(model, EvalCase(method, selection.keep, "bare", selection), batch)


def expected_dense(model, request):
    tokens = np.asarray(request.tokens)
    logits = np.asarray(forward(model.params, jnp.asarray(tokens[None]), MODEL))[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = np.arange(request.scored_from, len(tokens))
    return log_probs[places - 1, tokens[places]].sum(), bool((logits[places - 1].argmax(1) == tokens[places]).all())
