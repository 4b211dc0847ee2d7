"""One layer's operations in plain NumPy for one sequence and KV head: what `eval.speed` compares with."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from eval.speed.ops import Held, OpInputs, OpShape
from eval.speed.timing import Op
from spotlight_jax.cached_attention import LayerSelector

# Relative to the norm of the expected output. A GPU rounds float32 products to fewer bits.
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
# Of a layer that selects by hash functions: two programs may round a query's weights apart by one, which moves
# a few tokens over the cut.
TOLERANCE_HASHED = 0.15


def plain_scores(
    codes: UInt32[np.ndarray, "words n"], weights: Int[np.ndarray, "score_heads code_bits"]
) -> Int[np.ndarray, " n"]:
    """Return the highest sum of the weights of set bits, each less half of its weights, rounded down."""
    little = np.ascontiguousarray(codes.T).astype("<u4").view(np.uint8)
    bits = np.unpackbits(little, axis=1, bitorder="little")
    sums = np.stack([np.zeros(len(bits), np.int64) - row.sum() // 2 for row in weights.astype(np.int64)])
    for place in range(bits.shape[1]):
        sums += bits[None, :, place].astype(np.int64) * weights[:, place, None]
    return sums.max(axis=0)


def plain_selection(scores: Int[np.ndarray, " n"], budget: int) -> Int[np.ndarray, " budget"]:
    """Return the newest token, and the highest scores of the others, newest first among equals; ascending."""
    newest_last = scores.astype(np.int64) * len(scores) + np.arange(len(scores))  # all different
    newest_last[-1] = np.iinfo(np.int64).max
    return np.sort(
        np.argpartition(newest_last, len(scores) - budget)[-budget:] if budget < len(scores) else np.arange(len(scores))
    )


def plain_attention(
    queries: Float[np.ndarray, "group head_dim"],
    keys: Float[np.ndarray, "n head_dim"],
    values: Float[np.ndarray, "n head_dim"],
) -> Float[np.ndarray, "group head_dim"]:
    """Return softmax attention."""
    scores = queries @ keys.T / np.sqrt(queries.shape[1])
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True) @ values


def _float(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32))


class Expected:
    """Expected outputs for the first sequence and its first KV head."""

    def __init__(self, shape: OpShape, inputs: OpInputs, held: Held) -> None:
        """Fetch what one head reads; its newest token is the one that a layer appends."""
        self.shape, self.inputs = shape, inputs
        self._scores: dict[bytes, np.ndarray] = {}
        assert held.layer.codes is not None
        self.codes = np.asarray(held.layer.codes[0, 0, :, : shape.length])
        self.keys, self.values = (_float(rows[0, : shape.length, 0]) for rows in (held.layer.keys, held.layer.values))
        self.queries = _float(inputs.queries[0, 0, : shape.group])

    def scores(self, weights: jax.Array) -> np.ndarray:
        """Return the scores of every token, computed once for the same weights."""
        one = np.asarray(weights)[0, 0, 0]
        key = one.tobytes()
        if key not in self._scores:
            self._scores[key] = plain_scores(self.codes, one)
        return self._scores[key]

    def selection(self, weights: jax.Array) -> np.ndarray:
        """Return the selected positions."""
        return plain_selection(self.scores(weights), self.shape.budget)

    def attention(self, positions: np.ndarray | slice, appends: bool) -> np.ndarray:
        """Return the attention of the group's queries over these tokens."""
        keys, values = self.keys, self.values
        if appends:
            keys, values = keys.copy(), values.copy()
            keys[-1], values[-1] = _float(self.inputs.keys[0, 0, 0]), _float(self.inputs.values[0, 0, 0])
        return plain_attention(self.queries, keys[positions], values[positions])

    def hashed(self, selector: LayerSelector) -> np.ndarray:
        """Return the output of a whole sparse layer."""
        weights = selector.functions.query_weights(self.inputs.queries, per_kv_head=True)
        return self.attention(self.selection(weights), appends=True)

    def of(self, name: str) -> tuple[np.ndarray, float]:
        """Return the named operation's output, and how far one may be from it (0: integers are equal)."""
        weights = self.inputs.signs if name.endswith("Hamming") else self.inputs.weights
        tolerance = TOLERANCE[self.shape.dtype]
        base = name.split(", ")[0]
        if base == "score":
            return self.scores(weights), 0.0
        if base in ("select", "lax.top_k", "score + select", "score + lax.top_k"):
            return self.selection(weights), 0.0
        if base in ("attend", "score + select + attend"):
            return self.attention(self.selection(weights), appends=False), tolerance
        if base == "sparse layer":
            selector = self.inputs.hamming if name.endswith("Hamming") else self.inputs.selector
            return self.hashed(selector), TOLERANCE_HASHED
        return self.attention(slice(None), appends=True), tolerance


def _first_head(name: str, out: Any, shape: OpShape) -> np.ndarray:
    """Return what an operation gave for the first sequence and KV head."""
    if "top_k" in name:
        return np.sort(np.asarray(out[0, 0]))
    if name.split(",")[0].endswith("select"):
        positions, is_real = (np.asarray(part)[0, 0] for part in out)
        return positions[is_real]
    if name.startswith("score") and "attend" not in name:
        return np.asarray(out[0, 0, : shape.length])
    return _float(out.reshape(shape.batch, shape.q_heads, shape.head_dim)[0, : shape.group])


def check_ops(shape: OpShape, ops: Mapping[str, Op], inputs: OpInputs, held: Held) -> dict[str, float]:
    """Return the relative difference of each operation from its plain version.

    Raises: AssertionError naming an operation that gives something else.
    """
    expected, found = Expected(shape, inputs, held), {}
    for name, op in ops.items():
        right, tolerance = expected.of(name)
        got = _first_head(name, jax.jit(lambda held, op=op: op(jnp.int32(0), inputs, held)[0])(held), shape)
        if name == "lax.top_k" or name == "score + lax.top_k":  # ties may go to other tokens, and the newest is no rule
            scores = expected.scores(inputs.weights)
            right, got = np.sort(scores)[-shape.budget :], np.sort(scores[got])
        if tolerance == 0:
            assert np.array_equal(got, right), f"{name} differs from the plain version at {shape.length} tokens"
            found[name] = 0.0
            continue
        error = float(np.linalg.norm(got - right) / np.linalg.norm(right))
        assert error <= tolerance, f"{name} is off by {error:.2g} at {shape.length} tokens (at most {tolerance})"
        found[name] = error
    return found
