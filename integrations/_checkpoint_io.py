"""Lightning checkpoints without the base, each with a directory next to it that contains the saved prompt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from softhooks.integration_support.checkpoints import TENSORS

from ._outer_module import OuterModule

SUFFIX = ".prompt"


class TrainingCallback(Protocol):
    """A callback that trains a prompt.

    Attributes:
        name: the name of the prompt.
        beside: whether to write a directory with the saved prompt next to each checkpoint.
        outer: the module that contains the prompted model; None before the prompt is attached.
    """

    name: str
    beside: bool
    outer: OuterModule | None


class PromptFiles:
    """Wraps the `checkpoint_io` of a Lightning strategy, to save the prompt next to checkpoints without the base."""

    def __init__(self, checkpoint_io: Any, callback: TrainingCallback) -> None:
        self.checkpoint_io = checkpoint_io
        self.callback = callback

    def __getattr__(self, name: str) -> Any:
        if name == "checkpoint_io":  # missing while the object is being copied
            raise AttributeError(name)
        return getattr(self.checkpoint_io, name)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint without the base, and the prompt next to it."""
        outer = self.callback.outer
        if outer is not None and outer.prompt.is_attached:
            checkpoint = {**checkpoint, "state_dict": outer.prune(checkpoint["state_dict"])}
            folder = self._folder(path)
            if folder is not None:
                outer.prompt.save_pretrained(folder)
        self.checkpoint_io.save_checkpoint(checkpoint, path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and the prompt directory next to it."""
        self.checkpoint_io.remove_checkpoint(path)
        folder = self._folder(path)
        if folder is not None and (folder / TENSORS).is_file():
            shutil.rmtree(folder)

    def _folder(self, path: Any) -> Path | None:
        if not self.callback.beside or "://" in str(path):
            return None
        several = "" if self.callback.name == "default" else f".{self.callback.name}"
        return Path(str(path).removesuffix(".ckpt") + several + SUFFIX)


def prompt_files_of(files: Any) -> Iterator[PromptFiles]:
    """Yield the `PromptFiles` that wrap a `checkpoint_io`, outermost first; each callback that trains a prompt adds one."""
    while isinstance(files, PromptFiles):
        yield files
        files = files.checkpoint_io
