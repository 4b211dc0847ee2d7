"""Archives of packages on indexes, pages and in folders: found by name and version, downloaded, not looked into."""

from __future__ import annotations

import contextlib
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pypi_simple
import requests
import requests.adapters
import urllib3
from packaging.utils import canonicalize_name, canonicalize_version

from spotlight_jax.index_config import PackageSources, read_index_config

_ATTEMPTS = 4  # at one archive; each goes on where the one before broke off
_CHUNK = 1 << 16  # bytes; what a broken connection loses at most

Archive = pypi_simple.DistributionPackage
Show = Callable[[int, int], None]  # bytes that are there, bytes of the whole


@contextlib.contextmanager
def open_index() -> Iterator[PackageIndex]:
    """Open everything that pip and uv are configured to look at."""
    cfg = read_index_config()
    with requests.Session() as session:
        retry = urllib3.Retry(total=2, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        session.verify = True if cfg.cert is None else cfg.cert
        session.proxies = {} if cfg.proxy is None else {"http": cfg.proxy, "https": cfg.proxy}
        yield PackageIndex(cfg, session)


class PackageIndex:
    """Indexes, pages and folders of archives as one; what goes wrong with one of them does not stop the others."""

    def __init__(self, cfg: PackageSources, session: requests.Session) -> None:
        self._cfg, self._session = cfg, session
        self.problems: list[str] = []  # of places that could not be used

    def find_archives(self, name: str, version: str, form: str, sha256: str) -> Iterator[Archive]:
        """Yield archives of a version ("sdist" or "wheel") that have the hash, or whose place gives none."""
        for location, is_index in self._locations():
            try:
                listed = self._list(location, is_index, name)
            except (requests.RequestException, ValueError) as error:
                self.problems.append(_reason(location, error))
                continue
            for archive in listed:
                is_form = archive.package_type == form and archive.version is not None
                is_version = is_form and canonicalize_version(str(archive.version)) == canonicalize_version(version)
                if is_version and (archive.digests or {}).get("sha256", sha256) == sha256:
                    yield archive

    def _locations(self) -> list[tuple[str, bool]]:
        """Return pages and folders (False) and indexes (True), those on this machine first."""
        found = [*((link, False) for link in self._cfg.links), *((index, True) for index in self._cfg.indexes)]
        return sorted(found, key=lambda one: _local_path(one[0]) is None)

    def _list(self, location: str, is_index: bool, name: str) -> list[Archive]:
        path = _local_path(location)
        if path is not None:
            return _list_local(path / canonicalize_name(name) / "index.html" if is_index else path, name)
        if is_index:
            index = pypi_simple.PyPISimple(location, session=self._session)
            try:
                return index.get_project_page(name, timeout=self._cfg.timeout).packages
            except pypi_simple.NoSuchProjectError:
                return []
        reply = self._session.get(location, timeout=self._cfg.timeout)
        reply.raise_for_status()
        return pypi_simple.ProjectPage.from_html(name, reply.content, reply.url).packages

    def download(self, archive: Archive, target: Path, show: Show) -> bool:
        """Write an archive to a file; a connection that breaks is taken up where it broke. False: it cannot be had."""
        try:
            if (path := _local_path(archive.url)) is not None:
                shutil.copyfile(path, target)
                show(path.stat().st_size, path.stat().st_size)
                return True
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._go_on(archive.url, target, show)
                    return True
                except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                    if attempt == _ATTEMPTS:
                        raise
                    time.sleep(0.25 * 2**attempt)
        except requests.RequestException as error:
            self.problems.append(_reason(archive.url, error))
            target.unlink(missing_ok=True)
        return False

    def _go_on(self, url: str, target: Path, show: Show) -> None:
        done = target.stat().st_size if target.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with self._session.get(url, headers=headers, stream=True, timeout=self._cfg.timeout) as reply:
            if reply.status_code == requests.codes.requested_range_not_satisfiable:
                return  # the whole had come before the connection broke
            reply.raise_for_status()
            if reply.status_code != requests.codes.partial_content:
                done = 0
            total = done + int(reply.headers.get("Content-Length", 0))
            show(done, total)
            with target.open("ab" if done else "wb") as file:
                for chunk in reply.iter_content(_CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    show(done, max(done, total))


def _list_local(path: Path, name: str) -> list[Archive]:
    if path.is_dir():
        links = "".join(f'<a href="{file.absolute().as_uri()}">{file.name}</a>' for file in sorted(path.iterdir()))
        return pypi_simple.ProjectPage.from_html(name, links).packages
    if not path.is_file():
        return []
    listed = pypi_simple.ProjectPage.from_html(name, path.read_bytes(), path.absolute().as_uri()).packages
    return [archive for archive in listed if (file := _local_path(archive.url)) is None or file.is_file()]


def _local_path(location: str) -> Path | None:
    """Return the path of a file address or a plain path; None for an address of the network."""
    if location.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(location).path))
    return None if "://" in location else Path(location).expanduser()


def _reason(location: str, error: Exception) -> str:
    """Return what went wrong, in a few words without the address, which may hold a password."""
    host = urllib.parse.urlsplit(location).hostname or "a package index"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{host} answers {error.response.status_code}"
    if isinstance(error, requests.exceptions.SSLError):
        return f"the certificate of {host} is not accepted"
    if isinstance(error, requests.Timeout):
        return f"{host} does not answer"
    if isinstance(error, requests.RequestException):
        return f"{host} cannot be reached"
    return f"{host} does not answer as a package index does"
