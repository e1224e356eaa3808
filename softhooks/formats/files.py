"""Write files so that a killed process leaves the old one or the new one; read them so that nothing in them is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from softhooks.errors import CheckpointError

_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading bytes that are no safetensors file, or a file of a precision that torch lacks, may raise."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(serialize(plain, metadata=metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`, and move it to `path` once it is written and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield part
        _sync(part)
        part.replace(path)
        with contextlib.suppress(OSError):  # not every file system can sync a directory
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata. No pickle is ever read.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except _UNREADABLE as error:
        raise CheckpointError(
            "a prompt's tensors must be in a whole safetensors file.",
            "Save the prompt again; files of other formats are not read.",
            file=path,
            found=f"{type(error).__name__}: {error}",
        ) from error


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} must hold JSON; it does not: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} must hold a JSON object; it holds {type(content).__name__}.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
