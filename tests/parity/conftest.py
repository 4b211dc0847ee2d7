import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="rewrite tests/models/golden from the reference's logits")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--record")
