"""Find the files of a prompt in a directory or on the hub, and read them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from softhooks.errors import CheckpointError
from softhooks.formats import peft_read, softhooks_files
from softhooks.formats.folders import explain_missing
from softhooks.formats.stored import StoredPrompt

Format = Literal["softhooks", "peft"]
MARKS: dict[Format, str] = {"softhooks": softhooks_files.TENSORS, "peft": peft_read.CONFIG}
"""The file that identifies a saved prompt, by format."""


def find(path: str | Path, revision: str | None = None, token: str | None = None) -> StoredPrompt:
    """Read a prompt from a directory or from the hub."""
    return read(Path(path) if _exists(Path(path)) else _download(str(path), revision, token))


def format_of(folder: Path) -> Format | None:
    """Return the format of the prompt in a folder, or None if there is no prompt."""
    # A softhooks prompt may lie beside the PEFT adapter that it was trained on, so softhooks' format comes first.
    return next((name for name, mark in MARKS.items() if (folder / mark).is_file()), None)


def read(folder: Path) -> StoredPrompt:
    """Read a prompt from a directory, in either format; raise a `CheckpointError` if there is none or it is damaged."""
    found = format_of(folder)
    if found is None:
        raise explain_missing(folder, tuple(MARKS.values()))
    return softhooks_files.read(folder / softhooks_files.TENSORS) if found == "softhooks" else peft_read.read(folder)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long for a file
        return False


def _download(repository: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [softhooks_files.DESCRIPTION, softhooks_files.TENSORS, peft_read.CONFIG, peft_read.TENSORS]
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repository!r} is neither a local directory nor a repository that can be downloaded from the hub.",
            "Check the path, or the name of the repository.",
            hub=f"{type(error).__name__}: {error}",
        ) from error
