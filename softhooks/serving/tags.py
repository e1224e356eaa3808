"""The tags of a stored prompt: a few words, in a small JSON file next to the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from softhooks.errors import CheckpointError, OptionError
from softhooks.formats.files import read_json, write_json

FILE = "tags.json"

_KEY = "tags"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST = 64
_MAX_BYTES = 2**16


def read_tags(folder: Path) -> list[str]:
    """Return the tags of the prompt in a folder, sorted; raise a `CheckpointError` if their file is damaged."""
    path = folder / FILE
    if not path.exists():
        return []
    tags = read_json(path, _MAX_BYTES).get(_KEY)
    if not isinstance(tags, list) or not all(map(_is_tag, tags)) or len(tags) > _MOST:
        raise CheckpointError(
            f"{path} does not have a list of at most {_MOST} tags.",
            "Remove the file, and tag the prompt again.",
            found=repr(tags)[:200],
        )
    return sorted(set(tags))


def write_tags(folder: Path, tags: Iterable[str]) -> None:
    """Replace the tags of the prompt in a folder; without tags, remove their file."""
    chosen = checked_tags(tags)
    if len(chosen) > _MOST:
        raise OptionError(f"a prompt would have {len(chosen)} tags; at most {_MOST} are allowed.")
    if chosen:
        write_json(folder / FILE, {_KEY: chosen})
    else:
        (folder / FILE).unlink(missing_ok=True)


def checked_tags(tags: Iterable[str]) -> list[str]:
    """Return tags sorted and without duplicates; raise an `OptionError` for a string that cannot be a tag."""
    given = [tags] if isinstance(tags, str) else list(tags)
    for tag in given:
        if not _is_tag(tag):
            raise OptionError(
                f"{tag!r} cannot be a tag; use at most 64 letters, digits, dots, - and _, beginning with a letter or digit."
            )
    return sorted(set(given))


def _is_tag(value: object) -> bool:
    return isinstance(value, str) and _TAG.fullmatch(value) is not None
