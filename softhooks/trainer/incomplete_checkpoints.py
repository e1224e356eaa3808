"""Renaming of incomplete checkpoints of a killed process, so that the Trainer resumes from the last complete checkpoint.

The Trainer writes a checkpoint file by file, `trainer_state.json` last, and `resume_from_checkpoint=True` uses the checkpoint
with the highest number, complete or not. A process that writes a checkpoint holds a lock in its folder; an incomplete folder
without a lock is renamed. Nothing is deleted.

Many scripts look for the last checkpoint before they create their Trainer, and pass the name of a folder that is renamed later.
Until the first step, a link with this name points to the last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""The module that locks files; without it, it is unknown whether a writing process still runs."""

logger = logging.getLogger(__name__)

INCOMPLETE = "incomplete"
LOCK = ".soft_prompt.writing"
_STATE = (
    "trainer_state.json"  # `TRAINER_STATE_NAME`, copied because its module imports everything that a Trainer can use
)
_JIT = "checkpoint-is-incomplete.txt"
_OURS = "soft_prompt"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Lock:
    """A lock on a checkpoint folder while it is written; the operating system releases the lock when the process dies.

    Creating the lock deletes the `trainer_state.json` of an earlier run, which would make an incomplete checkpoint look complete,
    and the links that `rename_incomplete` created.
    """

    held: ClassVar[dict[Path, Lock]] = {}
    """The locks of this process. One that is still held when another Trainer is made was left by an error."""

    def __init__(self, folder: Path) -> None:
        remove_links(replacement_links(folder.parent))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder.resolve() / LOCK
        self._file: IO[str] | None = self._path.open("w")
        self.held[self._path] = self
        (folder / _STATE).unlink(missing_ok=True)
        if fcntl is not None:
            with contextlib.suppress(
                OSError
            ):  # the file system does not support locks, so nothing will be renamed there
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Release the lock. Calling it again does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
            self.held.pop(self._path, None)


def rename_incomplete(output_dir: Path) -> list[Path]:
    """Rename the incomplete checkpoints that follow the last complete one, with a warning.

    Only folders that are empty or were started by a SoftPromptCallback are renamed.

    Returns:
        the new paths.
    """
    remove_links([link for link in replacement_links(output_dir) if not link.exists()])
    moved: list[Path] = []
    newest = next(_newest_first(output_dir), None)
    for folder in _newest_first(output_dir):
        damage = find_damage(folder)
        if damage is None or not _is_ours(folder) or _is_being_written(folder):
            break
        target = _free(folder.with_name(f"{INCOMPLETE}-{folder.name}"))
        folder.rename(target)
        moved.append(target)
        logger.warning("%s is incomplete (%s); it was renamed to %s", folder, damage, target.name)
    if moved:
        last = next(_newest_first(output_dir), None)
        logger.warning("the last complete checkpoint in %s is %s", output_dir, "none" if last is None else last.name)
        assert newest is not None
        _link(newest, last)
    return moved


def _link(name: Path, last: Path | None) -> None:
    """Link the name of a renamed checkpoint to the last complete one, or warn that a script using this name must be restarted."""
    try:
        if last is not None:
            name.symlink_to(last.name, target_is_directory=True)
            logger.warning(
                "until the first step, %s is a link to it, for a script that already has this name",
                name.name,
            )
            return
    except OSError:  # the file system does not support links
        pass
    logger.warning("a script that passes %s to the Trainer cannot resume; start it again", name.name)


def replacement_links(output_dir: Path) -> list[Path]:
    """Return the links that replace renamed checkpoints."""
    return [entry for entry in _entries(output_dir) if entry.is_symlink() and _NAME.fullmatch(entry.name)]


def remove_links(links: list[Path]) -> None:
    """Remove the links and clear the list; called once all processes have loaded their checkpoint, before the next is written."""
    while links:
        links.pop().unlink(missing_ok=True)


def find_damage(folder: Path) -> str | None:
    """Describe what is missing from a checkpoint, or return None if it is complete."""
    try:
        content = json.loads((folder / _STATE).read_bytes())
    except OSError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is truncated"
    if not isinstance(content, dict):
        return f"{_STATE} is truncated"
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is truncated"
    for file in sorted(folder.glob(f"{_OURS}*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):  # reads only the header and compares it with the file size
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is truncated"
    return None


def _newest_first(output_dir: Path) -> Iterator[Path]:
    found = [(int(match[1]), entry) for entry in _entries(output_dir) if (match := _NAME.fullmatch(entry.name))]
    yield from (entry for _, entry in sorted(found, reverse=True) if entry.is_dir())


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_ours(folder: Path) -> bool:
    names = [entry.name.lstrip(".") for entry in _entries(folder) if entry.name != _JIT]
    return not names or any(name.startswith(_OURS) for name in names)


def _is_being_written(folder: Path) -> bool:
    """Whether a running process, here or on another machine, holds the folder's lock; True if this is unknown."""
    path = folder.resolve() / LOCK
    if path in Lock.held:
        Lock.held[path].release()
        return False
    if fcntl is None:
        return True
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _free(path: Path) -> Path:
    """Return a path that does not exist yet."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
