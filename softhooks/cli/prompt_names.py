"""The name that a command gives to a prompt whose name the user does not give."""

from __future__ import annotations

from pathlib import Path


def default_name(source: str) -> str:
    """Return the last part of the path of a prompt's directory, or of its name on the Hub."""
    path = Path(source)
    return path.resolve().name if path.exists() else path.name
