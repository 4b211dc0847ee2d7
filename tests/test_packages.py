"""Pinned packages are fetched from where pip and uv are configured to, without either, and nothing of them runs."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading

import pytest

from spotlight_jax import packages
from spotlight_jax.errors import InputError
from spotlight_jax.index_config import read_index_config

NAME = "tiny_book-1.0.tar.gz"


@pytest.fixture(autouse=True)
def _nothing_is_configured(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "SSL_CERT")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "shared"))


def _sdist() -> bytes:
    """A source package whose code would end this process."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in (("setup.py", b"import os; os._exit(9)"), ("book.txt", os.urandom(300_000))):
            info = tarfile.TarInfo(f"tiny_book-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


class _Index(http.server.BaseHTTPRequestHandler):
    """A package index whose first answers can be failures."""

    archive = _sdist()
    failures: list[str]  # what the next requests of the archive meet: "busy" or "cut"
    requests: list[tuple[str, str | None, str | None]]

    def do_GET(self):
        self.requests.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        if self.path == "/simple/tiny-book/":
            page = f'<a href="../../files/{NAME}#sha256={hashlib.sha256(self.archive).hexdigest()}">{NAME}</a>'
            return self._answer(200, page.encode(), "text/html")
        if self.path != f"/files/{NAME}":
            return self._answer(404, b"", "text/html")
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "busy":
            return self._answer(503, b"", "text/plain")
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self._answer(206 if start else 200, self.archive[start:], "application/gzip", 100_000 if failure else None)

    def _answer(self, status, content, kind, sent=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def index():
    _Index.failures, _Index.requests = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


def _package(content: bytes = _Index.archive) -> packages.Package:
    return packages.Package("tiny-book", "1.0", hashlib.sha256(content).hexdigest(), is_sdist=True)


@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_the_index_of_pip_or_uv_is_asked_and_a_source_package_is_not_run(index, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, index)
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    steps = []
    archive = packages.fetch_package(_package(), tmp_path, lambda *step: steps.append(step))
    assert archive.name == NAME and archive.read_bytes() == _Index.archive
    size = len(_Index.archive)
    assert steps[0] == ("fetching tiny-book 1.0", 0, size) and steps[-1] == ("fetching tiny-book 1.0", size, size)


def test_a_download_that_breaks_goes_on_where_it_broke_and_a_busy_server_is_asked_again(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    _Index.failures = ["busy", "cut", "cut"]
    assert packages.fetch_package(_package(), tmp_path).read_bytes() == _Index.archive
    ranges = [wanted for path, wanted, _ in _Index.requests if path.startswith("/files")]
    assert ranges == [None, None, f"bytes={1 << 16}-", f"bytes={2 << 16}-"]  # in whole chunks of 64 KiB


def test_an_extra_index_and_a_folder_are_searched_too(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.replace("simple", "empty"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    assert packages.fetch_package(_package(), tmp_path).read_bytes() == _Index.archive
    (tmp_path / "wheelhouse").mkdir()
    (tmp_path / "wheelhouse" / NAME).write_bytes(_Index.archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheelhouse"))
    assert packages.fetch_package(_package(), tmp_path).read_bytes() == _Index.archive


def test_an_index_of_files_is_read(tmp_path, monkeypatch):
    for folder in ("simple/tiny-book", "files"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "files" / NAME).write_bytes(_Index.archive)
    (tmp_path / "simple/tiny-book/index.html").write_text(f'<a href="../../files/{NAME}">{NAME}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    assert packages.fetch_package(_package(), tmp_path).read_bytes() == _Index.archive


def test_a_password_in_an_address_is_used_and_not_shown(index, tmp_path, monkeypatch):
    address = index.replace("127.0.0.1", "user:secret@127.0.0.1").replace("simple", "empty")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(InputError, match=r"cannot fetch tiny-book 1\.0 \(127\.0\.0\.1 cannot be reached\)") as caught:
        packages.fetch_package(_package(), tmp_path)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert _Index.requests[0][2] is not None


def test_an_archive_of_another_hash_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    with pytest.raises(InputError, match="no archive with its hash"):
        packages.fetch_package(_package(b"other"), tmp_path)
    assert not list(tmp_path.glob("*.gz"))


def test_settings_come_from_files_and_variables_override_them(tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_CONFIG_FILE")
    for folder, name, text in (
        (
            "config/pip",
            "pip.conf",
            "[global]\nindex-url = https://one/simple\nextra-index-url =\n  https://two\n  https://three\n",
        ),
        ("config/uv", "uv.toml", '[[index]]\nurl = "https://four"\n[[index]]\nurl = "https://five"\ndefault = true\n'),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    cfg = read_index_config()
    assert cfg.indexes == ("https://one/simple", "https://two", "https://three", "https://four")
    monkeypatch.setenv("PIP_INDEX_URL", "https://six")
    monkeypatch.setenv("UV_INDEX", "internal=https://seven")
    monkeypatch.setenv("PIP_TIMEOUT", "7")
    monkeypatch.setenv("PIP_CERT", "own.pem")
    cfg = read_index_config()
    assert cfg.indexes == ("https://six", "https://two", "https://three", "https://four", "https://seven")
    assert (cfg.timeout, cfg.cert) == (7.0, "own.pem")


def test_broken_settings_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("index-url without a section\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(InputError, match="pip's configuration") as caught:
        read_index_config()
    assert "\n" not in str(caught.value)
