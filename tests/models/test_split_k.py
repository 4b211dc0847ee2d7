import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.models import split_k
from spotlight_jax.models.decoder import apply_layer, embed_tokens
from spotlight_jax.models.runner import Dense
from spotlight_jax.models.split_k import pieces_of, split_k_dot
from tests.models import tiny
from tests.models.test_decoder import build
from tests.tolerances import tolerance

LAST_WITH_FIRST = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pieces", [1, 4, 8])
def test_pieces_add_up_to_the_product(pieces: int, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "pieces_of", lambda rows, depth, backend: pieces)
    x = jax.random.normal(jax.random.key(0), (3, 2, 48), dtype)
    kernel = (jax.random.normal(jax.random.key(1), (48, 5)) / 7).astype(dtype)
    product = split_k_dot(x, kernel, LAST_WITH_FIRST)
    assert product.dtype == dtype and product.shape == (3, 2, 5)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(np.asarray(product, np.float64), expected, **tolerance(dtype))


def test_pieces_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "pieces_of", lambda rows, depth, backend: 4)
    x = jnp.asarray([[[256.0, 1.0, 1.0, -256.0]]], jnp.bfloat16)  # in bfloat16, 256 + 1 is 256
    product = split_k_dot(x, jnp.ones((4, 1), jnp.bfloat16), LAST_WITH_FIRST)
    np.testing.assert_array_equal(np.asarray(product, np.float32), [[[2.0]]])


@pytest.mark.parametrize(
    ("rows", "depth", "backend", "pieces"),
    [
        (24, 3584, "gpu", 4),  # Qwen2.5-7B's queries, keys and values
        (24, 18944, "gpu", 8),  # its MLP
        (64, 18944, "gpu", 8),
        (65, 18944, "gpu", 1),  # a prompt
        (1, 18944, "gpu", 1),
        (24, 14336, "gpu", 1),  # Llama-3-8B's MLP: XLA's pieces are right
        (24, 576, "gpu", 1),  # SmolLM2-135M
        (24, 18946, "gpu", 1),  # eight pieces do not fit
        (24, 18944, "cpu", 1),
    ],
)
def test_few_rows_of_deep_weights_are_split_on_a_gpu(rows: int, depth: int, backend: str, pieces: int) -> None:
    assert pieces_of(rows, depth, backend) == pieces


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "width"), [(3584, 4608), (18944, 3584)])
def test_products_of_a_step_on_a_gpu(depth: int, width: int) -> None:
    assert pieces_of(24, depth, jax.default_backend()) > 1
    x = jax.random.normal(jax.random.key(0), (24, 1, depth), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (depth, width), jnp.bfloat16) / depth**0.5
    product = jax.jit(split_k_dot, static_argnums=2)(x, kernel, LAST_WITH_FIRST)
    expected = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    np.testing.assert_allclose(np.asarray(product, np.float32), expected, **tolerance(jnp.bfloat16))


def test_a_layer_whose_products_are_split_gives_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, params = build("qwen25_tied")
    x = embed_tokens(params, jnp.asarray(tiny.tokens())[:, :9], cfg)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None, :], x.shape[:2])

    def run():
        return jax.jit(lambda *args: apply_layer(*args, Dense(), cfg)[0])(params["layer_0"], x, positions)

    whole, seen = run(), []
    monkeypatch.setattr(split_k, "pieces_of", lambda rows, depth, backend: seen.append(depth) or 4)
    np.testing.assert_allclose(run(), whole, **tolerance(jnp.float32))
    assert seen == [cfg.embed] * 3 + [cfg.mlp]  # queries, keys, values; back from the MLP
