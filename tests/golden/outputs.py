"""What is recorded, part by part, and how close another machine's numbers must be."""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from eval.model.scores import Sequence, score_sequence
from eval.perplexity import command
from eval.perplexity import run as perplexity
from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.engine import DecodeConfig, Engine
from spotlight_jax.generation import head_shape
from spotlight_jax.models.decoder import init_params
from spotlight_jax.models.presets import PRESETS
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.selector.selection import SelectionConfig, select_by_codes, select_mask, select_tokens
from spotlight_jax.weights import WeightBounds
from tests.eval import tiny
from tests.hash_params import draw_params
from tests.train import conftest as training_runs
from train import layerwise, loop

Outputs = dict[str, np.ndarray]

MODEL = PRESETS["tiny"]
HASHES = {
    "transform": TransformConfig(code_bits=64),
    "asymmetric": NetworkConfig("asymmetric", code_bits=64, hidden=24),
    "paper": NetworkConfig("symmetric", 32, skip="none", hidden=24, code_heads="query", centre=False),
}
SPARSE = SelectionConfig(keep=0.2, min_tokens=5, min_context=0, dense_layers=(0,))
PROMPTS = (61, 7, 40)  # tokens of a ragged batch
NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Rule:
    """At least `share` of the numbers are within `atol + rtol * |recorded|`; without arguments: all are equal."""

    rtol: float = 0.0
    atol: float = 0.0
    share: float = 1.0

    def misfits(self, found: np.ndarray, recorded: np.ndarray) -> str:
        """What is wrong, in words; "" where the rule holds."""
        if found.shape != recorded.shape or found.dtype != recorded.dtype:
            return f"is {found.dtype}{found.shape}, recorded was {recorded.dtype}{recorded.shape}"
        off = np.abs(found.astype(np.float64) - recorded.astype(np.float64))
        within = off <= self.atol + self.rtol * np.abs(recorded.astype(np.float64))
        if within.mean() >= self.share:
            return ""
        return f"{np.sum(~within):,} of {within.size:,} numbers are off, by up to {np.nanmax(off):.3g}"


# By how a name starts, the first that fits. A query's weights are rounded: another machine may round one the other way,
# which moves a token over the cut, and all that is computed from there on.
RULES = {
    "hashing/code": Rule(share=0.998),
    "hashing/weights": Rule(share=0.995),
    "log-probabilities/dense": Rule(rtol=1e-4, atol=1e-4),
    "log-probabilities/": Rule(rtol=1e-3, atol=1e-3, share=0.8),
    "rows/count": Rule(),
    "rows/ppl": Rule(rtol=3e-3),
    "training/loss": Rule(rtol=1e-3, atol=1e-4),
    "training/selector, tail": Rule(atol=0.1, share=0.75),  # as Adam does, over twenty steps
    "training/selector, up_to_64.tail": Rule(atol=0.1, share=0.75),
    "training/selector": Rule(rtol=1e-3, atol=1e-3, share=0.75),  # AdamW takes the sign of slopes that are almost 0
}


def rule_of(name: str) -> Rule:
    """The rule of an array; exact where `RULES` has none."""
    return next((rule for start, rule in RULES.items() if name.startswith(start)), Rule())


def model_selector(form: str) -> Selector:
    """Hash functions of the tiny model that differ from where training starts."""
    return Selector(head_shape(MODEL), draw_params(HASHES[form], head_shape(MODEL)), "tiny", {})


def greedy_texts() -> Outputs:
    """Greedy tokens of a ragged batch, dense and by each form of hash functions."""
    params, rng = init_params(jax.random.key(0), MODEL), np.random.default_rng(3)
    prompts = [rng.integers(0, MODEL.vocab, length).tolist() for length in PROMPTS]
    texts = {}
    for form in (None, *HASHES):
        cfg = DecodeConfig(prefill_chunk=32, selection=SPARSE)
        engine = Engine(MODEL, params, form and model_selector(form), cfg)
        state = engine.prefill(prompts, NEW_TOKENS)
        tokens = [np.asarray(state.tokens)[:, None]]
        while not np.asarray(state.is_done).all():
            state, more = engine.decode(state)
            tokens.append(np.asarray(more))
        texts[form or "dense"] = np.concatenate(tokens, axis=1)[:, :NEW_TOKENS].astype(np.int16)
    return texts


def selections() -> Outputs:
    """Positions chosen from integer codes and weights, and from integer and float scores, in a ragged batch."""
    rng, lengths, found = np.random.default_rng(4), jnp.asarray([300, 57], jnp.int32), {}
    codes = jnp.asarray(rng.integers(0, 2**32, (2, 2, 4, 300), dtype=np.uint32))
    for name, bounds, sums in (("int8", WeightBounds(127, 1020), 2), ("signs", WeightBounds(1, 128), 1)):
        weights = rng.integers(-7, 7, (2, 4, sums, 128), endpoint=True)
        weights = weights if name == "int8" else np.where(weights < 0, -1, 1)
        for always, (sinks, recent) in (("bare", (0, 0)), ("sinks", (4, 9))):
            cfg = SelectionConfig(keep=0.1, sink_tokens=sinks, recent_tokens=recent)
            call = codes, jnp.asarray(weights, jnp.int32), bounds, lengths, cfg
            found[f"codes, {name}, {always}"] = _positions(*jax.jit(select_by_codes, static_argnums=(2, 4))(*call))
    integers = jnp.asarray(rng.integers(-20, 20, (2, 3, 300)), jnp.int32)
    floats = jnp.asarray(rng.normal(size=(2, 3, 300)), jnp.float32)
    cfg = SelectionConfig(budget=30, sink_tokens=2)
    select = jax.jit(select_tokens, static_argnums=(2, 3))
    found["tokens, integers"] = _positions(*select(integers, lengths, cfg, (-20, 20)))
    found["tokens, floats"] = _positions(*select(floats, lengths, cfg))
    scores = jnp.asarray(rng.integers(-20, 20, (2, 40, 3, 40)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32)[None], (2, 40))
    cfg = SelectionConfig(keep=0.3, min_tokens=4)
    mask = jax.jit(select_mask, static_argnums=(2, 3))(scores, positions, cfg, (-20, 20))
    found["mask"] = np.packbits(np.asarray(mask))
    return found


def _positions(places: jax.Array, is_real: jax.Array) -> np.ndarray:
    """Chosen positions, -1 in slots that are not real."""
    return np.where(is_real, places, -1).astype(np.int16)


def hashed() -> Outputs:
    """Bits of keys' codes, and integer weights of queries, by each form."""
    rng, found = np.random.default_rng(5), {}
    queries = jnp.asarray(rng.normal(size=(2, 9, MODEL.q_heads, MODEL.head_dim)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 9, MODEL.kv_heads, MODEL.head_dim)), jnp.float32)
    for form, cfg in HASHES.items():
        params = model_selector(form).params.layer(1)
        codes = np.asarray(jax.jit(lambda params, x: params.key_codes(x))(params, keys))
        found[f"code bits, {form}"] = np.unpackbits(np.ascontiguousarray(codes).view(np.uint8))
        for per_kv_head in (False, True)[: 1 if cfg.code_heads == "query" else 2]:
            weigh = jax.jit(lambda params, x, per_kv_head: params.query_weights(x, per_kv_head), static_argnums=2)
            weights = weigh(params, queries, per_kv_head)
            found[f"weights, {form}, per {'KV' if per_kv_head else 'query'} head"] = np.asarray(weights, np.int16)
    return found


def log_probabilities() -> Outputs:
    """Of each next token of one sequence, dense and as each form reads."""
    model, found = tiny.model(), {}
    selection = SelectionConfig(keep=0.1, min_tokens=5, dense_layers=(0,))
    for name in ("dense", *HASHES):
        own = dataclasses.replace(model, selector=model_selector(name)) if name in HASHES else model
        method = own.open_method("spotlight" if name in HASHES else "dense", selection)
        passed = score_sequence(own, Sequence(tiny.draw_tokens(96)), method, selection)
        found[name] = np.asarray(passed.log_probs, np.float32)
    return found


def evaluation_rows() -> Outputs:
    """The rows of a small evaluation, in the order in which they were written."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "use_compile_cache", lambda: None)
        folder = pathlib.Path(name)
        flags = [*tiny.write_inputs(folder), "--window", "96", "--out", str(folder / "run"), "--keep", "0.1"]
        flags += ["--selection.min-tokens", "5", "--selection.dense-layers", "0"]
        flags += ["--methods", "dense", "oracle-scores", "spotlight", "lsh", "quest", "window"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            assert command(flags) == 0
    rows = json.loads(out.getvalue().splitlines()[-1])["results"]
    found = {f"ppl, {field}": np.asarray([row[field] for row in rows]) for field in ("ppl", "ppl_pooled")}
    counts = ("tokens_read", "bytes_read", "index_bytes", "tokens_scored", "documents")
    return found | {f"count, {field}": np.asarray([row[field] for row in rows]) for field in counts}


def training() -> Outputs:
    """A short run on token ids: the loss of each step, and the selector that it leaves."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "use_compile_cache", lambda: None)
        folder = pathlib.Path(name)
        flags = training_runs.write_inputs(folder).flags(folder / "run")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert layerwise.command(flags) == 0
        return trained(folder / "run")


def trained(run: pathlib.Path) -> Outputs:
    """What is recorded of a finished training run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {"loss": np.asarray([row["loss"] for row in rows if "loss" in row])}
    return losses | {
        f"selector, {name}": leaf for name, leaf in load_file(run / "selector/selector.safetensors").items()
    }


PARTS: dict[str, Callable[[], Outputs]] = {
    "texts": greedy_texts,
    "selections": selections,
    "hashing": hashed,
    "log-probabilities": log_probabilities,
    "rows": evaluation_rows,
    "training": training,
}


def compute(part: str) -> Outputs:
    """A part's outputs by the names under which they are recorded."""
    return {f"{part}/{name}": np.asarray(array) for name, array in PARTS[part]().items()}
