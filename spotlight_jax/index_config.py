"""Where packages come from: what pip and uv are configured with, read without either of them.

Users sit behind mirrors, and environments made by uv have no pip. Their settings are read as they document them:
environment variables first, then configuration files. An index need not be trusted, for what is fetched is checked by
its hash.
"""

from __future__ import annotations

import configparser
import dataclasses
import math
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pypi_simple

from spotlight_jax.errors import InputError

_TIMEOUT = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class PackageSources:
    """Package indexes, pages or folders of archives, and how the network is reached."""

    indexes: tuple[str, ...]
    links: tuple[str, ...] = ()
    cert: str | None = None
    proxy: str | None = None
    timeout: float = _TIMEOUT


def read_index_config(environ: Mapping[str, str] = os.environ) -> PackageSources:
    """Read the settings of pip and uv together; without any, the index that both have by default."""
    pip, uv = _pip_options(environ), _uv_options(environ)
    default = pip.get("index-url") or uv.get("index-url") or pypi_simple.PYPI_SIMPLE_ENDPOINT
    extra = [*_words(pip.get("extra-index-url")), *uv.get("extra-index-url", ())]
    has_index = not any(str(options.get("no-index", "")).lower() in ("1", "true", "yes", "on") for options in (pip, uv))
    timeout = pip.get("timeout") or pip.get("default-timeout") or _TIMEOUT
    try:
        seconds = float(timeout)
        if not 0 < seconds < math.inf:
            raise ValueError
    except ValueError:
        raise InputError(
            f"pip's timeout is configured as {timeout!r}; it must be a number of seconds above 0"
        ) from None
    return PackageSources(
        indexes=tuple(dict.fromkeys([default, *extra])) if has_index else (),
        links=tuple(dict.fromkeys([*_words(pip.get("find-links")), *uv.get("find-links", ())])),
        cert=pip.get("cert") or environ.get("SSL_CERT_FILE") or None,
        proxy=pip.get("proxy") or None,
        timeout=seconds,
    )


def _words(value: str | None) -> list[str]:
    return (value or "").split()


def _pip_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's options by their long names; later files and then variables override earlier ones."""
    options: dict[str, str] = {}
    for file in _pip_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise InputError(f"pip's configuration '{file}' cannot be read: {str(error).splitlines()[0]}") from None
        for section in ("global", "download"):
            if parser.has_section(section):
                options |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    variables = {name: value for name, value in environ.items() if name.startswith("PIP_") and value}
    return options | {name[4:].lower().replace("_", "-"): value for name, value in variables.items()}


def _pip_files(environ: Mapping[str, str]) -> list[Path]:
    """Return where pip looks for its configuration, the weakest first."""
    own = environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return []
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    shared = [Path(folder) for folder in platformdirs.site_config_dir("pip", False, multipath=True).split(os.pathsep)]
    home = Path.home()
    folders = [*reversed(shared), home / ".pip", home / ".config" / "pip"]
    folders.append(Path(platformdirs.user_config_dir("pip", False, roaming=True)))
    everywhere = [] if sys.platform == "win32" else [Path("/etc/pip.conf")]
    return [*everywhere, *(folder / name for folder in folders), Path(sys.prefix, name), *([Path(own)] if own else [])]


def _uv_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return uv's options by the names that pip has for them."""
    options: dict[str, Any] = {}
    folders = [*platformdirs.site_config_dir("uv", False, multipath=True).split(os.pathsep), "/etc/uv"]
    for folder in (*folders, platformdirs.user_config_dir("uv", False), str(Path.home() / ".config" / "uv")):
        file = Path(folder, "uv.toml")
        if file.is_file():
            options |= _uv_file(file)
    if default := environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL"):
        options["index-url"] = _strip_name(default)
    for variable, name in (("UV_INDEX", "extra-index-url"), ("UV_EXTRA_INDEX_URL", "extra-index-url")):
        if value := environ.get(variable):
            options[name] = [*options.get(name, ()), *map(_strip_name, value.split())]
    if value := environ.get("UV_FIND_LINKS"):
        options["find-links"] = value.replace(",", " ").split()
    if value := environ.get("UV_NO_INDEX"):
        options["no-index"] = value
    return options


def _uv_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"uv's configuration '{file}' cannot be read: {str(error).splitlines()[0]}") from None
    options: dict[str, Any] = {
        name: table[name] for name in ("index-url", "extra-index-url", "find-links", "no-index") if name in table
    }
    for index in table.get("index", ()):
        if index.get("default"):
            options["index-url"] = index["url"]
        else:
            options["extra-index-url"] = [*options.get("extra-index-url", ()), index["url"]]
    return options


def _strip_name(index: str) -> str:
    """Return the address of an index that may be written NAME=ADDRESS."""
    name, mark, address = index.partition("=")
    return address if mark and name.replace("-", "").replace("_", "").isalnum() else index
