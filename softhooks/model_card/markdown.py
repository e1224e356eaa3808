"""Write tables and code in Markdown; the texts may contain any characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MAX_LENGTH = 160


def code(value: object) -> str:
    """Return a value as inline code on one line, shortened if it is long."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text[: _MAX_LENGTH - 1]}…`" if len(text) > _MAX_LENGTH else f"`{text or ' '}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
