"""Download the files of a saved prompt from the Hub.

The size that the Hub announces is checked before a file is downloaded. A download that turns out to be larger is stopped before
the surplus is written to disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softhooks.errors import CheckpointError
from softhooks.formats import peft_read, softhooks_files
from softhooks.formats.hub_commit import HubCommit
from softhooks.formats.hub_errors import client_error, reason

MAX_BYTES = {".safetensors": 4 * 2**30, ".json": 16 * 2**20}
"""The largest files to download, by suffix. 4 GiB hold 16,384 tokens of keys and values of Llama 3 8B in fp32."""


def download(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> tuple[Path, HubCommit]:
    """Download a prompt. Return the directory that contains its files, and the commit that `revision` refers to.

    Without a connection, files that were downloaded before are used.

    Args:
        repo_id: the name of the repository.
        revision: a branch, a tag or a commit; by default, the branch `main`.
        token: as in `huggingface_hub`.

    Raises:
        CheckpointError: the repository or the revision does not exist, contains no prompt, cannot be reached, or announces or
            sends a file that is too large.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"{repo_id}, revision {revision or 'main'}"
    try:
        file = _find_files(repo_id, revision, token)
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a local directory nor a repository that can be downloaded from the Hub.",
            "Check the path, the name of the repository and the connection; a private repository needs a token.",
            hub=reason(error.__cause__ or error),
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            "the repository does not contain a saved prompt.",
            "Check its name and the revision; pickles (`adapter_model.bin`) are not loaded.",
            repository=where,
            expected=f"{softhooks_files.TENSORS}, or {peft_read.CONFIG} and {peft_read.TENSORS}",
        ) from error
    except (client_error(), OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "the prompt cannot be downloaded from the Hub.",
            "Check the revision and the connection, and try again.",
            repository=where,
            hub=reason(error),
        ) from error
    return file.parent, HubCommit(repo_id, file.parent.name)


def _find_files(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Download softhooks' file or, if there is none, PEFT's files; return the path of the first."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _download_file(repo_id, softhooks_files.TENSORS, revision, token)
    except EntryNotFoundError as error:
        first = error
    is_unreachable = isinstance(first, LocalEntryNotFoundError)  # then PEFT's files may be in the cache
    try:
        file = _download_file(repo_id, peft_read.CONFIG, revision, token, local_files_only=is_unreachable)
        _download_file(repo_id, peft_read.TENSORS, file.parent.name, token, local_files_only=is_unreachable)
        return file
    except EntryNotFoundError:
        if not is_unreachable:
            raise
    raise first


def _download_file(
    repo_id: str, filename: str, revision: str | None, token: str | bool | None, *, local_files_only: bool = False
) -> Path:
    """Download a file into the cache. Its directory has the name of the commit."""
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    announced = hf_hub_download(repo_id, filename, dry_run=True, **where)
    limit = MAX_BYTES[Path(filename).suffix]
    size = limit if announced.file_size is None else announced.file_size  # None: the server did not send a size
    if size > limit:
        raise CheckpointError(
            f"{filename} in the repository {repo_id!r} is too large for a saved prompt; it was not downloaded.",
            f"If you trust the repository, download it with `hf download {repo_id}`, and load the directory.",
            announced=f"{size:,} bytes",
            largest=f"{limit:,} bytes",
            commit=announced.commit_hash,
        )
    bar = _limited_progress_bar(f"{filename} in the repository {repo_id!r}", size)
    return Path(hf_hub_download(repo_id, filename, tqdm_class=bar, **where))


def _limited_progress_bar(file: str, size: int) -> type[Any]:
    """Return a class of progress bars that stop the download of a file when it exceeds its announced size.

    huggingface_hub creates the bar with the size in the response's header, and updates it before each chunk is written.
    """
    from huggingface_hub.utils.tqdm import tqdm

    def check(found: float | None) -> None:
        if found is not None and found > size:
            raise CheckpointError(
                f"the server sends more bytes than it announced for {file}; the download was stopped.",
                "Try again. If the error persists, the repository or a proxy is damaged; do not use the file.",
                announced=f"{size:,} bytes",
                sent=f"at least {int(found):,} bytes",
            )

    class LimitedProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            check(kwargs.get("total"))
            self._received = kwargs.get("initial") or 0
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._received += n or 0
            check(self._received)
            updated: bool | None = super().update(n)
            return updated

    return LimitedProgressBar
