"""A tiny model, token ids, and one finished run that other runs are compared with."""

import contextlib
import dataclasses
import io
import pathlib

import numpy as np
import pytest

from spotlight_jax import metrics
from spotlight_jax.selector import networks, transform
from tests.models import tiny
from train import capture, layerwise, loop, step

LAYERS, WINDOW, LENGTH = 3, 64, 160  # at this length one group is shared out between two sums
STEPS, SAVE_EVERY = 12, 5


NETWORKS = ["--hash.form", "asymmetric", "--hash.hidden", "8"]  # small, as are these samples of pairs
PAIRS = ["--ranking.loss", "pairs", "--ranking.tops", "8", "--ranking.others", "16", "--ranking.always-top", "2"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What runs are made of."""

    model: pathlib.Path
    tokens: pathlib.Path

    def flags(self, out: pathlib.Path, *more: str) -> list[str]:
        """Flags of the run that `finished` is, into another folder."""
        sizes = f"""--length {LENGTH} --data.window {WINDOW} --data.held-out-windows 2
            --steps {STEPS} --steps-per-window 2 --tail.windows 2 --tail.queries 16 --tail.steps 20
            --hash.code-bits 32 --ranking.queries 16 --measure.every 4 --measure.queries 8 --measure.dense-layers 0
            --save-every {SAVE_EVERY} --optimizer.ema 0.8""".split()
        return ["--model", str(self.model), "--data.train", str(self.tokens), *sizes, "--out", str(out), *more]


@dataclasses.dataclass(frozen=True)
class Finished:
    """An uninterrupted run and what it printed on stdout."""

    path: pathlib.Path
    stdout: str


# Optax and Orbax build these with norms, shapes and None in place of arrays, as any `jax.tree.map` may.
_TREES = (
    *(networks.HashNetwork, networks.NetworkWeights, networks.KeyStats, networks.NetworkHash),
    *(transform.TransformWeights, transform.KeyQuantizer, transform.TransformHash),
    *(metrics.SelectionQuality, capture.Captured, step.TrainState, step.StepReport),
)


def _prepare(patch: pytest.MonkeyPatch) -> None:
    """Trees take leaves of any kind, functions still check theirs; compiled programs stay where the tests keep them."""
    for tree in _TREES:
        patch.setattr(tree, "__init__", tree.__init__.__wrapped__)
    patch.setattr(loop, "use_compile_cache", lambda: None)


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    _prepare(monkeypatch)


def write_inputs(folder: pathlib.Path) -> Inputs:
    """A tiny model and token ids in a folder."""
    config = tiny.CASES["llama3"] | {"num_hidden_layers": LAYERS, "max_position_embeddings": 256}
    tiny.write_folder(folder / "model", config)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, 2000).astype(np.uint16)
    np.save(folder / "tokens.npy", ids)
    return Inputs(folder / "model", folder / "tokens.npy")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        _prepare(patch)
        assert layerwise.command(inputs.flags(path)) == 0
    return Finished(path, stdout.getvalue())
