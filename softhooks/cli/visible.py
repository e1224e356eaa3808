"""Text from untrusted files, made safe to print."""

from __future__ import annotations


def visible(text: str, kept: str = "") -> str:
    """Escape control characters, such as line breaks and terminal escapes, except those in `kept`."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
