"""Rename the incomplete checkpoints of a killed process, so that the Trainer resumes from the last complete one.

`resume_from_checkpoint=True` uses the checkpoint with the highest number, even an incomplete one. The Trainer writes
`trainer_state.json` last, so a checkpoint without this file is incomplete. While a process writes a checkpoint, it locks a file
in its folder; an incomplete checkpoint without a lock is renamed. Nothing is deleted.

Some scripts look for the last checkpoint before they create the Trainer, and then pass the old name of a renamed folder.
Therefore, until the first step, a link with this name points to the last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
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

logger = logging.getLogger(__name__)

INCOMPLETE = "incomplete"
LOCK = ".soft_prompt.writing"
# `TRAINER_STATE_NAME` of transformers, copied because its module imports everything that a Trainer can use
_STATE = "trainer_state.json"
_JIT = "checkpoint-is-incomplete.txt"
_OURS = "soft_prompt"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Lock:
    """A lock on a checkpoint folder, held while a process writes the checkpoint. If the process dies, the lock is released."""

    held: ClassVar[dict[Path, Lock]] = {}
    """The locks of this process. A lock that is still held when another Trainer is created is from a failed checkpoint."""

    def __init__(self, folder: Path) -> None:
        remove_links(replacement_links(folder.parent))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder.resolve() / LOCK
        self._file: IO[str] | None = self._path.open("w")
        self.held[self._path] = self
        (folder / _STATE).unlink(missing_ok=True)  # a file from an earlier run would make this checkpoint look complete
        if fcntl is not None:
            with contextlib.suppress(OSError):  # if the file system has no locks, nothing is renamed
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Release the lock. Calling it again does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
            self.held.pop(self._path, None)


def rename_incomplete(output_dir: Path) -> list[Path]:
    """Rename checkpoints newer than the last complete one, log a warning for each, and return their new paths.

    Only folders that are empty or were written with a SoftPromptCallback are renamed.
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
    """Link the old name of a renamed checkpoint to the last complete one, or warn that the old name cannot be used."""
    try:
        if last is not None:
            name.symlink_to(last.name, target_is_directory=True)
            logger.warning("until the first step, %s is a link to this checkpoint, for scripts that pass it", name.name)
            return
    except OSError:  # the file system does not support links
        pass
    logger.warning("a script that passes %s to the Trainer cannot resume; start it again", name.name)


def replacement_links(output_dir: Path) -> list[Path]:
    """Return the links that `rename_incomplete` has created."""
    return [entry for entry in _entries(output_dir) if entry.is_symlink() and _NAME.fullmatch(entry.name)]


def remove_links(links: list[Path]) -> None:
    """Remove the links and clear the list; called after all processes have resumed and before a checkpoint is written."""
    while links:
        links.pop().unlink(missing_ok=True)


def find_damage(folder: Path) -> str | None:
    """Describe a missing or truncated file of a checkpoint, or return None if the checkpoint is complete."""
    try:
        content = json.loads((folder / _STATE).read_bytes())
    except OSError:
        return f"{_STATE} is missing"
    except (ValueError, RecursionError):
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
    """Whether a running process on any machine holds the folder's lock; True if this is unknown."""
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
    """Return a path that does not exist, with a number at the end if needed."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())
