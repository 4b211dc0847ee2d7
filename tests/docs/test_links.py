"""Links between pages lead somewhere; what a page says about files and targets is so."""

import html
import re

import pytest

from tests.docs.blocks import LAB, PAGES, ROOT, all_blocks

ALL = [*PAGES, *sorted(LAB.glob("*.md")), ROOT / "CHANGELOG.md"]
MADE = ("reference/", "changes.md", "index.md")  # of the site, by docs/hooks
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def _anchors(page):
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", html.unescape(re.sub(r"[`*]", "", title))).strip().lower()
        anchors.add(re.sub(r"[-\s]+", "-", plain))
    return anchors


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_a_file_and_a_heading(page):
    dead = []
    for target in _LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_made = file.is_relative_to(ROOT / "docs") and file.relative_to(ROOT / "docs").as_posix().startswith(MADE)
        if file.name == "api.md" or (is_made and not file.exists()):
            continue  # anchors that mkdocstrings makes, and pages of commands: `make docs` checks them
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            dead.append(target)
    assert not dead


def test_the_site_shows_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert f" {name}\n" in nav or (LAB in page.parents and name.startswith("lab/2")), name


def test_lab_notes_are_dated_and_listed():
    listed = (LAB / "index.md").read_text(encoding="utf-8")
    for note in LAB.glob("2*.md"):
        date = re.match(r"\d{4}-\d\d-\d\d", note.name)
        assert date and note.read_text(encoding="utf-8").startswith(f"# {date[0]}: ") and f"({note.name}" in listed


def test_make_targets_in_blocks_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in all_blocks("sh"):
        for words in block.commands():
            if words and words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (block.name, words)
