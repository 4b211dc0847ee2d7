"""A tiny model with a selector, opened once for all tests of evaluations."""

import functools

import jax
import numpy as np

from eval.model.load import EvalModel
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.checkpoint import Selector, save_selector
from tests.hash_params import draw_params

MODEL = PRESETS["tiny"]
HASH = TransformConfig(code_bits=32)


@functools.cache
def make_selector(per_query_head=False, seed=1):
    cfg = NetworkConfig(form="symmetric", code_bits=32, hidden=8, code_heads="query") if per_query_head else HASH
    shape = head_shape(MODEL)
    return Selector(shape, draw_params(cfg, shape, seed), "random:tiny", {})


@functools.cache
def model():
    params = init_params(jax.random.key(0), MODEL)
    # attention sharper and louder than a new model's, so that what is read matters
    for layer in range(MODEL.layers):
        for name in ("q", "v"):
            params[f"layer_{layer}"][name]["kernel"] = params[f"layer_{layer}"][name]["kernel"] * 8
    return EvalModel(MODEL, params, None, make_selector(), "random:tiny")


def draw_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, MODEL.vocab, length).astype(np.int32)


def write_inputs(folder):
    """Two texts of token ids and a selector folder: flags for commands."""
    for name, seed in (("one", 1), ("two", 2)):
        np.save(folder / f"{name}.npy", draw_tokens(700, seed).astype(np.uint16))
    save_selector(folder / "selector", make_selector(), "card")
    texts = [str(folder / "one.npy"), str(folder / "two.npy")]
    return ["--model", "random:tiny", "--selector", str(folder / "selector"), "--texts", *texts]
