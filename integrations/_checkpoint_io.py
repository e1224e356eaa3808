"""Checkpoints of a Trainer that asks something else to write them: the base left out, and the prompt in a directory beside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from softhooks.integration_support.checkpoints import TENSORS

from ._carrier import Carrier

SUFFIX = ".prompt"
"""How the directory beside a checkpoint is called."""


class Trains(Protocol):
    """A callback that trains a prompt.

    Attributes:
        name: the prompt's.
        beside: whether to write the directory.
        carrier: the module around the prompted model, once there is one.
    """

    name: str
    beside: bool
    carrier: Carrier | None


class PromptFiles:
    """Stands in for a strategy's `checkpoint_io`: takes the base out of what is written, and writes the prompt beside it."""

    def __init__(self, checkpoint_io: Any, callback: Trains) -> None:
        self.checkpoint_io = checkpoint_io
        self.callback = callback

    def __getattr__(self, name: str) -> Any:
        if name == "checkpoint_io":  # not yet there, while a copy is made
            raise AttributeError(name)
        return getattr(self.checkpoint_io, name)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        carrier = self.callback.carrier
        if carrier is not None and carrier.prompt.is_attached:
            checkpoint = {**checkpoint, "state_dict": carrier.prune(checkpoint["state_dict"])}
            folder = self._folder(path)
            if folder is not None:
                carrier.prompt.save_pretrained(folder)
        self.checkpoint_io.save_checkpoint(checkpoint, path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and the prompt beside it."""
        self.checkpoint_io.remove_checkpoint(path)
        folder = self._folder(path)
        if folder is not None and (folder / TENSORS).is_file():
            shutil.rmtree(folder)

    def _folder(self, path: Any) -> Path | None:
        if not self.callback.beside or "://" in str(path):
            return None
        several = "" if self.callback.name == "default" else f".{self.callback.name}"
        return Path(str(path).removesuffix(".ckpt") + several + SUFFIX)


def layers_of(files: Any) -> Iterator[PromptFiles]:
    """What stands in, the outermost first; each callback that trains a prompt has its own."""
    while isinstance(files, PromptFiles):
        yield files
        files = files.checkpoint_io
