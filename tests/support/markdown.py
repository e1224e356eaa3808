"""Code blocks of Markdown pages, and the HTML comment in the line before a block."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)

_BLOCK = re.compile(
    r"^(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, relative to the repository.
        line: of its first line of code.
        language: the word behind the fence.
        comment: the HTML comment in the line before, or "".
    """

    page: str
    line: int
    language: str
    code: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[Block]:
    """The blocks of a page in order, of one language if it is given."""
    text = text_of(page)
    found = [
        Block(
            page,
            text.count("\n", 0, match.start("code")) + 1,
            match["language"],
            match["code"],
            match["comment"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if not language or block.language == language]


def words(page: str) -> int:
    """How many words a page has, as `wc -w` counts them."""
    return len(text_of(page).split())
