"""Greedy generation against transformers' own, token for token; run with `-m parity`."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.config.generation import DecodeConfig
from spotlight_jax.engine import Engine
from spotlight_jax.models.hf import hf_name, load_hf_config, read_hf_weights
from spotlight_jax.models.load import load_model
from spotlight_jax.models.params import fill_params
from tests.models import tiny

pytestmark = pytest.mark.parity
SCALED_BY_LENGTH = [case for case in tiny.CASES if "dynamic" in case]  # transformers turns cached keys by other angles


def generate_greedily(engine: Engine, prompts: list[list[int]], count: int) -> np.ndarray:
    state = engine.prefill(prompts, count)
    chosen = [np.asarray(state.tokens)[:, None]]
    while not np.asarray(state.is_done).all():
        state, tokens = engine.decode(state)
        chosen.append(tokens)
    return np.concatenate(chosen, axis=1)


def generate_by_reference(model, prompt: list[int], count: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    out = model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", [case for case in tiny.CASES if case not in SCALED_BY_LENGTH])
def test_tiny_models_continue_as_transformers(case: str, tmp_path: pathlib.Path) -> None:
    import torch
    import transformers

    tiny.write_folder(tmp_path, tiny.CASES[case], 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    cfg = load_hf_config(tmp_path)
    params = fill_params(read_hf_weights(tmp_path), hf_name, cfg, jnp.float32, case)
    prompt = tiny.tokens()[0, :12].tolist()
    ours = generate_greedily(Engine(cfg, params, None, DecodeConfig()), [prompt], 32)[0].tolist()
    assert ours == generate_by_reference(model, prompt, 32)


def test_smollm2_continues_as_transformers(smollm2_by_torch, monkeypatch) -> None:
    monkeypatch.setattr(smollm2_by_torch.generation_config, "eos_token_id", None)
    model = load_model("smollm2-135m", jnp.float32)
    texts = ("The capital of France is", "def add(first, second):\n    ")
    prompts = [list(model.tokenizer(text).input_ids) for text in texts]
    ours = generate_greedily(Engine(model.cfg, model.params, None, DecodeConfig()), prompts, 64)
    for row, prompt in enumerate(prompts):
        assert ours[row].tolist() == generate_by_reference(smollm2_by_torch, prompt, 64)
