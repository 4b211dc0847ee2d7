"""`spotlight eval perplexity` beside torch, on real text and weights."""

import math

import numpy as np
import pytest

from eval.perplexity import PerplexityConfig
from eval.perplexity import run as perplexity
from tests.models import golden

pytestmark = pytest.mark.parity
WINDOW = 512


def test_dense_perplexity_of_smollm2_equals_torch(tmp_path, monkeypatch, smollm2_by_torch) -> None:
    import torch

    monkeypatch.setattr(perplexity, "use_compile_cache", lambda: None)
    tokens = np.asarray(golden.read_smollm2()["tokens"])
    np.save(tmp_path / "text.npy", tokens.astype(np.uint16))
    cfg = PerplexityConfig(
        texts=(str(tmp_path / "text.npy"),),
        window=WINDOW,
        windows_per_text=2,
        methods=("dense",),
        dtype="float32",
        out=str(tmp_path / "run"),
    )
    (row,) = perplexity.main(cfg)["results"]

    losses = []
    for window in tokens[: 2 * WINDOW].reshape(2, WINDOW):
        ids = torch.from_numpy(window.astype(np.int64))[None]
        with torch.no_grad():
            losses.append(smollm2_by_torch.eval()(ids, labels=ids).loss.item())
    expected = np.mean([math.exp(loss) for loss in losses])
    print(f"perplexity {row['ppl']:.6f}, torch {expected:.6f}")
    assert row["ppl"] == pytest.approx(expected, rel=1e-3)
    assert row["ppl_pooled"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
