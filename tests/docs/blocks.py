"""Blocks of code in the pages of the documentation, and the commands in them."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LAB = ROOT / "docs" / "lab"  # entries stay as they were written
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if LAB not in page.parents),
]
# What a marker before a block says: the block is run, by `make slow`, or its flags are parsed.
RUN, PARSED = ("slow",), ("gpu", "hub", "minutes")
_BLOCK = re.compile(r"(?:^<!-- test: (\w+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    marker: str | None
    language: str
    text: str

    @property
    def name(self) -> str:
        """The block's place, as a test's name."""
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Words of every command, without comments; what stands in a pipe is a command of its own."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("|") if "|" in words else len(words)
                found.append(words[:end])
                words = words[end + 1 :]
        return found


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page that name their language."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    return [
        Block(name, text.count("\n", 0, found.start()) + 1, found[1], found[2], found[3])
        for found in _BLOCK.finditer(text)
    ]


def all_blocks(language: str) -> list[Block]:
    """The blocks in a language of all pages that say what is true now."""
    return [block for page in PAGES for block in read_blocks(page) if block.language == language]
