"""Names of models: a local path means the same from every folder, and no relative path becomes a hub id."""

import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.models.load import load_config
from spotlight_jax.models.source import find_again, lasting_name
from spotlight_jax.selector.checkpoint import load_selector


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny.gguf").write_bytes(b"")
    return folder


def test_local_paths_become_absolute_and_other_names_stay(model, monkeypatch):
    monkeypatch.chdir(model.parent.parent)
    assert lasting_name("models/tiny") == lasting_name("./models/../models/tiny") == str(model)
    assert lasting_name("models/tiny.gguf") == f"{model}.gguf"
    assert lasting_name("models/gone.gguf") == str(model.parent / "gone.gguf")
    for name in ("smollm2-135m", "random:tiny", "maker/model"):
        assert lasting_name(name) == name


@pytest.mark.parametrize("name", ["models/tiny", "./models/tiny", "models/tiny.gguf"])
def test_an_old_relative_path_is_found_around_the_run_it_was_written_for(model, name, monkeypatch):
    run = model.parent.parent / "runs" / "mine" / "selector"
    run.mkdir(parents=True)
    monkeypatch.chdir(run)
    assert find_again(name, run) == str(model) + (".gguf" if name.endswith(".gguf") else "")


def test_what_is_nowhere_around_a_run_may_be_a_hub_id_or_a_path(tmp_path):
    assert find_again("maker/model", tmp_path) is None
    assert find_again("", tmp_path) is None
    assert find_again("random:tiny", tmp_path) == "random:tiny"
    assert find_again("/gone/model", tmp_path) == "/gone/model"


def test_a_name_too_long_for_a_file_is_no_file(tmp_path):
    name = "x" * 5000
    assert lasting_name(name) == name and find_again(name, tmp_path) is None
    for source in (name, f"{name}.gguf"):
        with pytest.raises(InputError):
            load_config(source)
    with pytest.raises(InputError, match="is no selector"):
        load_selector(tmp_path / name)
