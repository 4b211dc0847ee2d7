"""Pages of the site that are made of other files: the README, the changelog, every command's flags."""

import contextlib
import html
import importlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from spotlight_jax import cli

ROOT = Path(__file__).parent.parent.parent

# What a marker before a block of commands tells the reader; `tests/docs` reads the same markers.
NEEDS = {
    "gpu": "Needs a GPU. The tests check that these flags exist and fit together.",
    "hub": "Needs files that are not part of the project. The tests check that these flags exist and fit together.",
    "minutes": "Takes minutes. The tests check that these flags exist and fit together.",
}

# Pages of commands whose flags depend on others: what the page shows besides the default.
VARIANTS = {
    "train": (("--preset", "paper"), ("--hash.form", "asymmetric")),
}
OTHERS = (("python -m train.ablate", "train.ablate", "compare recipes side by side on the same windows"),)


class _Seen(Exception):  # noqa: N818
    """What a command would have parsed."""


def commands() -> list[tuple[str, str, str]]:
    """Return the title, module and purpose of every command."""
    return [(f"spotlight {name}", module, text) for name, module, text in cli._COMMANDS] + list(OTHERS)


def page_of(title: str) -> str:
    """Return the path of a command's page."""
    name = title.removeprefix("spotlight ").removeprefix("python -m ")
    return f"reference/{re.sub(r'[ .]', '-', name)}.md"


def parser_of(module: str, args: Sequence[str] = ()) -> Any:
    """Return the parser (argparse, made by tyro) that a command's module would parse `args` with."""
    import tyro

    def seen(config_class: type, prog: str, description: str, args: Any = None, default: Any = None) -> None:
        raise _Seen(config_class, prog, description, default)

    with _replaced(cli, "parse", seen):
        try:
            importlib.import_module(module).command(list(args))
        except _Seen as found:
            config_class, prog, description, default = found.args
    options = {} if default is None else {"default": default, "config": (tyro.conf.AvoidSubcommands,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # get_parser, which has no successor
        return tyro.extras.get_parser(config_class, prog=prog, description=description, **options)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _code(text: str) -> str:
    return f"<code>{_escape(text)}</code>"


def _escape(text: str) -> str:
    """Return a text that is no Markdown."""
    return html.escape(text).replace("|", "&#124;").replace("[", "&#91;").replace("*", "&#42;")


def _prose(text: str) -> str:
    """Return a help text as one table cell."""
    parts = " ".join(text.split()).split("`")
    return "".join(_code(part) if i % 2 else _escape(part) for i, part in enumerate(parts))


def flag_rows(group: Any) -> list[str]:
    """Return a table row for every flag of a group of a parser."""
    rows = []
    for action in group._group_actions:
        if "--help" in action.option_strings:
            continue
        given = action.help or ""
        text, found, default = given.rpartition("(default:")
        if not found:
            text, default = given.removesuffix("(required)"), "required" if given.endswith("(required)") else ""
        values = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
        names = ", ".join(_code(name) for name in action.option_strings)  # none: it follows no flag
        is_switch = any(name.startswith("--no-") or ".no-" in name for name in action.option_strings)
        kind = "" if is_switch else _code(values)
        value = default.strip(" )\n")
        name = "<br>".join(part for part in (names, kind) if part)
        rows.append(f"| {name} | {_code(value) if found else value} | {_prose(text)} |")
    return rows


def flag_tables(parser: Any) -> list[str]:
    """Return Markdown with a table for every group of flags."""
    lines = []
    for group in parser._action_groups:
        if rows := flag_rows(group):
            lines += ["", f"### {group.title.removesuffix(' options').capitalize()}", ""]
            lines += [_prose(group.description), ""] if group.description else []
            lines += ["| flag | default | meaning |", "|---|---|---|", *rows]
    return lines


def _description(text: str) -> list[str]:
    """Return a command's docstring as Markdown: what is indented in it is code."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        lines.append(line if line.startswith("    ") else html.escape(line, quote=False).replace("[", "&#91;"))
    return lines


def command_page(title: str, module: str) -> str:
    """Return the page of one command, as Markdown."""
    parser = parser_of(module)
    lines = [
        f"# {title}",
        "",
        *_description(importlib.import_module(module).__doc__ or ""),
        "",
        "## Flags",
        *flag_tables(parser),
    ]
    name = title.removeprefix("spotlight ")
    known = {option for action in parser._actions for option in action.option_strings}
    for variant in VARIANTS.get(name, ()):
        changed = parser_of(module, variant)
        added = [a for a in changed._actions if not known & set(a.option_strings)]
        if added:
            known |= {option for action in added for option in action.option_strings}
            lines += ["", f"### Only with `{' '.join(variant)}`", "", "| flag | default | meaning |", "|---|---|---|"]
            lines += flag_rows(type("Group", (), {"_group_actions": added}))
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the list of all commands, as Markdown."""
    lines = ["# Commands", "", "These pages are made from the code when the site is built.", ""]
    lines += ["| command | |", "|---|---|"]
    lines += [f"| [`{title}`]({Path(page_of(title)).name}) | {text} |" for title, _, text in commands()]
    return "\n".join(lines) + "\n"


def from_root(text: str) -> str:
    """Return Markdown of the root folder as a page of docs/: links into docs/ lose that folder."""
    text = text.replace("](CHANGELOG.md)", "](changes.md)").replace("](CONTRIBUTING.md)", "](contributing.md)")
    text = re.sub(r"\[([^\]]*)\]\((examples/[^)]*|CITATION\.cff)\)", r"\1 (`\2`)", text)  # files that no page shows
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of commands and the lab notes into the navigation."""
    for section in config.nav or ():
        if "Reference" in section:
            pages: list[Any] = ["reference/commands.md", *({title: page_of(title)} for title, _, _ in commands())]
            section["Reference"][0] = {"Commands": pages}
        if "Lab notes" in section:
            notes = sorted(Path(config.docs_dir, "lab").glob("2*.md"), reverse=True)
            section["Lab notes"] += [f"lab/{note.name}" for note in notes]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {
        "index.md": from_root((ROOT / "README.md").read_text(encoding="utf-8")),
        "contributing.md": from_root((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "changes.md": from_root((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        "reference/commands.md": commands_page(),
        **{page_of(title): command_page(title, module) for title, module, _ in commands()},
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show what a block of commands needs, where a marker before it says so."""
    return re.sub(r"^<!-- test: (\w+) -->$", lambda found: _note(found[1]), markdown, flags=re.MULTILINE)


def _note(marker: str) -> str:
    return f'<p class="needs">{NEEDS[marker]}</p>\n' if marker in NEEDS else ""
