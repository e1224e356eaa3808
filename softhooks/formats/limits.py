"""Limits on the size of files and of JSON values, checked before a file is read, so that no file can exhaust the memory.

The limits are far above what softhooks and PEFT write. Single tensors need no limit: they are mapped from the file instead of
being copied, and safetensors refuses a header whose tensors do not fill the file exactly.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from softhooks.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""The largest JSON file, and the largest JSON text in a tensor file."""
MAX_JSON_DEPTH = 64
"""How deep lists and objects may be nested in JSON."""
MAX_HEADER_BYTES = 32 * 2**20
"""The largest header of a safetensors file, which contains the names and shapes of the tensors, and the metadata."""
MAX_TENSORS = 100_000
"""The largest number of tensors in a file."""
MAX_TENSOR_FILE_BYTES = 64 * 2**30
"""The largest tensor file."""

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


def require_size(path: Path, limit: int) -> None:
    """Raise a `CheckpointError` if a path is not a regular file (a pipe would block) or if the file is larger than `limit` bytes.

    Raises:
        OSError: there is no file, or it cannot be accessed.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file.", "Pass the directory that `save_pretrained` wrote.")
    if found.st_size > limit:
        raise _too_large(str(path), "bytes", found.st_size, limit)


def require_small_header(path: Path) -> None:
    """Raise a `CheckpointError` if a safetensors file is too large, or announces a header that is too large.

    Raises:
        OSError: there is no file, or it cannot be read.
    """
    require_size(path, MAX_TENSOR_FILE_BYTES)
    handle = os.open(path, os.O_RDONLY)
    try:
        length = int.from_bytes(os.read(handle, _LENGTH_BYTES), "little")
    finally:
        os.close(handle)
    if length > MAX_HEADER_BYTES:
        raise _too_large(str(path), "bytes in its header", length, MAX_HEADER_BYTES)


def require_few_tensors(count: int, source: str) -> None:
    """Raise a `CheckpointError` if a file contains too many tensors."""
    if count > MAX_TENSORS:
        raise _too_large(source, "tensors", count, MAX_TENSORS)


def require_short_text(size: int, source: str, limit: int = MAX_JSON_BYTES) -> None:
    """Raise a `CheckpointError` if a JSON text of `size` characters or bytes is too long."""
    if size > limit:
        raise _too_large(source, "bytes of JSON", size, limit)


def require_flat(value: Any, source: str) -> None:
    """Raise a `CheckpointError` if lists and objects are nested too deeply in a parsed JSON value."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [part for item in level for part in _parts(item) if isinstance(part, (dict, list))]
        if not level:
            return
    raise CheckpointError(
        f"{source} contains lists or objects that are nested more than {MAX_JSON_DEPTH} levels deep.",
        "Save the prompt again.",
    )


def _parts(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item


def _too_large(source: str, unit: str, found: int, limit: int) -> CheckpointError:
    return CheckpointError(
        f"{source} is too large for a saved prompt, and was not read.",
        "Check where the file comes from, and save the prompt again.",
        found=f"{found:,} {unit}",
        limit=f"{limit:,} {unit}",
    )
