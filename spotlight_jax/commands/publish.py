"""A selector as others will fetch it, shown or sent to the hub."""

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Any

from spotlight_jax import hub, manifest
from spotlight_jax.commands.push import PushConfig
from spotlight_jax.errors import InputError
from spotlight_jax.models.embedded import EMBEDDED
from spotlight_jax.models.presets import RANDOM
from spotlight_jax.selector.card import write_hub_card
from spotlight_jax.selector.checkpoint import Selector, load_selector, save_selector


def main(cfg: PushConfig) -> None:
    """Send the selector's files, or show what would be sent."""
    selector = load_selector(cfg.selector)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "selector"
        card = stage(folder, selector, cfg.to, hub_id(selector, cfg.base_model))
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        where = f"hf:{cfg.to} ({'private' if cfg.private else 'public'} where it is new)"
        if cfg.dry_run:
            print(f"would send {len(sizes)} files, {sum(sizes.values()):,} bytes, to {where}:")
            for name, size in sizes.items():
                print(f"  {name:{max(map(len, sizes))}}  {size:>13,} bytes")
            print(f"\nREADME.md:\n\n{card}")
            return
        address = hub.send(folder, cfg.to, cfg.private, f"Selector for {selector.base_model}")
        print(f"sent {len(sizes)} files, {sum(sizes.values()):,} bytes, to {address}; use it as --selector hf:{cfg.to}")


def stage(folder: pathlib.Path, selector: Selector, name: str, base_model: str) -> str:
    """Write the files that are sent, without local paths, and return the card.

    Args:
        folder: that is made.
        selector: as it was trained.
        name: of the repository, `owner/name`.
        base_model: the hub's id of the model that the selector serves.
    """
    known_here = selector.base_model if selector.base_model in EMBEDDED else base_model
    sent = dataclasses.replace(selector, base_model=known_here, info=_without_paths(selector.info))
    card = write_hub_card(sent, base_model, name)
    save_selector(folder, sent, card)
    shutil.rmtree(folder / "orbax")  # the same arrays again
    manifest.seal_folder(folder)
    return card


def hub_id(selector: Selector, given: str | None) -> str:
    """Return the hub's id of a selector's base model; raises InputError where it has none that others could fetch."""
    name = selector.base_model
    if given is not None:
        return given
    if name in EMBEDDED:
        return EMBEDDED[name].hub_id
    is_local = pathlib.Path(name).is_absolute() or name.count("/") != 1 or not selector.is_base_certain
    if is_local or name.startswith(RANDOM):
        raise InputError(
            f"the selector was trained for '{name}', which others cannot fetch; give --base-model OWNER/NAME"
        )
    return name


def _without_paths(value: Any) -> Any:
    """Return the same recipe and metrics with the last part of each absolute path alone."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    is_path = isinstance(value, str) and pathlib.PurePath(value).is_absolute()
    return pathlib.PurePath(value).name if is_path else value
