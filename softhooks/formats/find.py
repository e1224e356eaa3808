"""Find the files of a prompt in a directory or on the hub, and read them."""

from __future__ import annotations

from pathlib import Path

from softhooks.errors import CheckpointError
from softhooks.formats.missing import explain_missing
from softhooks.formats.native import DESCRIPTION, TENSORS
from softhooks.formats.native import read as read_native
from softhooks.formats.stored import StoredPrompt


def find(path: str | Path, revision: str | None = None, token: str | None = None) -> StoredPrompt:
    """Read a prompt from a directory or from the hub. See `load`."""
    return read(Path(path) if _exists(Path(path)) else _download(str(path), revision, token))


def read(folder: Path) -> StoredPrompt:
    """Read a prompt from a directory, in either format, and check it.

    Raises:
        CheckpointError: there is none, or it is not what it says.
    """
    if (folder / TENSORS).is_file():
        return read_native(folder / TENSORS)
    from softhooks.formats import peft_read

    if (folder / peft_read.CONFIG).is_file():
        return peft_read.read(folder)
    raise explain_missing(folder, (TENSORS, peft_read.CONFIG))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def _download(repository: str, revision: str | None, token: str | None) -> Path:
    """Fetch the few files of a prompt from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from softhooks.formats import peft_read

    wanted = [DESCRIPTION, TENSORS, peft_read.CONFIG, peft_read.TENSORS]
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "a prompt is loaded from a directory or from a repository on the hub.",
            "Check the path; a directory must exist on this machine.",
            asked=repository,
            hub=f"{type(error).__name__}: {error}",
        ) from error
