"""Checkpoints that a killed process has left half written, so that `resume_from_checkpoint=True` takes the last whole one.

The Trainer writes a checkpoint file by file, `trainer_state.json` last, and resumes from the highest number whatever is in it.
A process that is writing holds a lock; a folder without one that is not whole is set aside, and nothing is deleted.

Many scripts look for the last checkpoint before they make their Trainer, and so hand it the name of the folder that has just been
set aside. Until the first step, a link of that name leads to the last whole one.
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
"""How to lock files; where it is missing, nobody can tell whether a writer still lives."""

logger = logging.getLogger(__name__)

ASIDE = "incomplete"
LOCK = ".soft_prompt.writing"
_STATE = "trainer_state.json"  # `TRAINER_STATE_NAME`, whose module loads everything that a Trainer can use
_JIT = "checkpoint-is-incomplete.txt"
_OURS = "soft_prompt"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Lock:
    """Held by a process while a checkpoint is being written; the system lets go of it when the process dies.

    The state that an earlier run may have left there goes first, for it would make half a checkpoint look whole; so do links.
    """

    held: ClassVar[dict[Path, Lock]] = {}
    """This process's own locks: what they lock when another Trainer is made was given up by an error."""

    def __init__(self, folder: Path) -> None:
        drop(stand_ins(folder.parent))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder.resolve() / LOCK
        self._file: IO[str] | None = self._path.open("w")
        self.held[self._path] = self
        (folder / _STATE).unlink(missing_ok=True)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: what is left there is not set aside
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """The checkpoint is whole, or given up. Calling it again does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
            self.held.pop(self._path, None)


def set_aside(output_dir: Path) -> list[Path]:
    """Rename what a killed process has left after the last whole checkpoint, and say so.

    A folder counts only if a callback of ours began it, or if it is empty; those of others are left alone.

    Returns:
        the new names.
    """
    drop([link for link in stand_ins(output_dir) if not link.exists()])
    moved: list[Path] = []
    newest = next(_newest_first(output_dir), None)
    for folder in _newest_first(output_dir):
        missing = flaw(folder)
        if missing is None or not _is_ours(folder) or _is_being_written(folder):
            break
        target = _free(folder.with_name(f"{ASIDE}-{folder.name}"))
        folder.rename(target)
        moved.append(target)
        logger.warning("%s was never written to its end (%s); it is now %s", folder, missing, target.name)
    if moved:
        last = next(_newest_first(output_dir), None)
        logger.warning("the last whole checkpoint in %s is %s", output_dir, "none" if last is None else last.name)
        assert newest is not None
        _stand_in(newest, last)
    return moved


def _stand_in(name: Path, last: Path | None) -> None:
    """Let a name that a script may have found already lead to the last whole checkpoint, or say what such a script is to do."""
    try:
        if last is not None:
            name.symlink_to(last.name, target_is_directory=True)
            logger.warning("until the first step, %s leads there, for a script that has found it already", name.name)
            return
    except OSError:  # a file system without links
        pass
    logger.warning("a script that found %s before it made its Trainer cannot resume from it: start it again", name.name)


def stand_ins(output_dir: Path) -> list[Path]:
    """The links that stand in for checkpoints which were set aside."""
    return [entry for entry in _entries(output_dir) if entry.is_symlink() and _NAME.fullmatch(entry.name)]


def drop(links: list[Path]) -> None:
    """Remove links, and empty the list; once all processes have read what they resume from, before one writes again."""
    while links:
        links.pop().unlink(missing_ok=True)


def flaw(folder: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole."""
    try:
        content = json.loads((folder / _STATE).read_bytes())
    except OSError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is cut off"
    if not isinstance(content, dict):
        return f"{_STATE} is cut off"
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    for file in sorted(folder.glob(f"{_OURS}*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):  # reads the header only, and compares it with the file's size
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is cut off"
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
    """Whether a living process, here or on another machine, holds the folder's lock, or nobody can tell."""
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
    """A name that is not taken yet."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
