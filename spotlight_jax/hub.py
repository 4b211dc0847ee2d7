"""Hugging Face's hub: folders fetched from it and sent to it, every failure as one line."""

import pathlib
from collections.abc import Sequence
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from spotlight_jax.errors import InputError, first_line

PREFIX = "hf:"  # before the name of a selector on the hub
SELECTOR_FILES = ("README.md", "config.json", "manifest.json", "selector.safetensors")  # no code is fetched or sent
# What the hub answers, and what becomes of a connection, whichever HTTP library huggingface_hub uses.
_FAILURES: Any = HfHubHTTPError.__bases__


def fetch(name: str, patterns: Sequence[str], what: str, revision: str | None = None) -> pathlib.Path:
    """Return the local folder of a hub repository, fetched into huggingface_hub's cache where it is not there yet.

    Args:
        name: `owner/name`.
        patterns: of the files to fetch, such as `*.json`.
        what: the repository is to hold, for errors.
        revision: a branch, tag or commit; None: the main branch.

    Raises: InputError where the hub cannot be reached, or has no such repository or revision.
    """
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except RevisionNotFoundError:
        raise InputError(f"{name}: the hub has no revision '{revision}' of it") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: the hub has no such {what}, or it is gated and you are not logged in") from None
    except HFValidationError:
        raise InputError(f"{name}: neither a folder, a .gguf file nor a valid hub id") from None
    except (LocalEntryNotFoundError, *_FAILURES) as error:
        raise InputError(f"{name}: cannot be fetched from the hub (no network?): {first_line(error)}") from None


def fetch_selector(source: str) -> pathlib.Path:
    """Return the local folder of the selector `hf:owner/name` or `hf:owner/name@revision`. Raises as `fetch`."""
    name, at, revision = source.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or (at and not revision):
        raise InputError(f"'{source}' is no selector on the hub; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return fetch(name, SELECTOR_FILES, "selector", revision or None)


def send(folder: pathlib.Path, name: str, is_private: bool, message: str) -> str:
    """Send a folder's files to a repository of the hub, which is made where there is none; returns its address.

    Args:
        folder: whose files are sent, all in one commit.
        name: `owner/name`.
        is_private: whether a new repository is private; one that is there stays as it is.
        message: of the commit.

    Raises: InputError where there is no token, the token may not write there, or the hub cannot be reached.
    """
    if huggingface_hub.get_token() is None:
        raise InputError("the hub needs a token that may write: log in with 'hf auth login', or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(name, private=is_private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"'{name}' is no name that the hub takes: {first_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"your token may not write to '{name}' (HTTP {status}); give one that may") from None
        raise InputError(f"the hub did not take '{name}' (HTTP {status}): {first_line(error)}") from None
    except (RuntimeError, *_FAILURES) as error:  # of an upload that breaks off
        why = first_line(error.__cause__ or error)
        raise InputError(f"'{name}' cannot be sent to the hub (no network?): {why}; send it again") from None
    return address
