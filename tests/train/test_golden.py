"""A training run is as it was recorded; see `tests.golden`."""

from tests.golden import outputs, recorded


def test_losses_and_the_selector_are_as_recorded(finished):
    expected = {name: array for name, array in recorded.read(recorded.FILE)[0].items() if name.startswith("training/")}
    found = {f"training/{name}": array for name, array in outputs.trained(finished.path).items()}
    assert expected and recorded.compare(found, expected) == []
