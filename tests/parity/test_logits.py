"""Our decoder against transformers and torch (and accelerate, which it reads GGUF with); run with `-m parity`."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.models.hf import hf_name, load_hf_config, read_hf_weights
from spotlight_jax.models.load import load_model
from spotlight_jax.models.params import fill_params
from spotlight_jax.models.runner import forward
from tests.models import golden, tiny

pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parents[2]


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", tiny.CASES)
def test_tiny_model_equals_transformers(case: str, shards: int, tmp_path: pathlib.Path, record: bool) -> None:
    import torch
    import transformers

    tiny.write_folder(tmp_path, tiny.CASES[case], shards)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = reference_logits(model, tiny.tokens())

    cfg = load_hf_config(tmp_path)
    params = fill_params(read_hf_weights(tmp_path), hf_name, cfg, jnp.float32, case)
    ours = np.asarray(forward(params, jnp.asarray(tiny.tokens()), cfg))
    difference = np.abs(ours - expected).max()
    print(f"{case}: max |difference| {difference:.2e}, largest logit {np.abs(expected).max():.1f}")
    assert difference < 1e-4
    if record and shards == 1:
        golden.write_tiny(case, expected)


def test_smollm2_equals_transformers(record: bool, smollm2_by_torch) -> None:
    model = load_model("smollm2-135m", jnp.float32)
    if record:
        texts = [(ROOT / name).read_text() for name in ("docs/architecture.md", "spotlight_jax/attention.py")]
        tokens = np.concatenate([model.tokenizer(text)["input_ids"][:512] for text in texts])
    else:
        tokens = golden.read_smollm2()["tokens"]
    assert tokens.shape == (1024,)
    expected = reference_logits(smollm2_by_torch, tokens[None])[0]
    ours = np.asarray(forward(model.params, jnp.asarray(tokens[None], jnp.int32), model.cfg))[0]
    top = np.sort(expected, axis=-1)
    agree = float((ours.argmax(-1) == expected.argmax(-1)).mean())
    difference = np.abs(ours - expected).max()
    print(
        f"max |difference| {difference:.2e}, argmax agreement {agree}, closest race {(top[:, -1] - top[:, -2]).min()}"
    )
    assert difference < 1e-3
    assert agree == 1.0
    if record:
        golden.write_smollm2(tokens, expected)
