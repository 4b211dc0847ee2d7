import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="rewrite tests/models/golden from the reference's logits")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--record")


@pytest.fixture(scope="session")
def smollm2_by_torch():
    """The embedded model as transformers reads it, float32; tests leave it as it is."""
    import torch
    import transformers

    from spotlight_jax.models.embedded import fetch_embedded

    path = fetch_embedded("smollm2-135m")
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
