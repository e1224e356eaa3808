"""Read and write JSON and safetensors files; writes are atomic."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from softhooks.errors import CheckpointError
from softhooks.formats.limits import (
    MAX_JSON_BYTES,
    require_few_tensors,
    require_flat,
    require_short_text,
    require_size,
    require_small_header,
)

_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, OverflowError)
"""The errors for a damaged file, a file of another format, or a dtype that torch does not have."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(serialize(plain, metadata=metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; after the block, sync the file to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield part
        _sync(part)
        part.replace(path)
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
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
    """Read the tensors and the metadata of a safetensors file; raise a `CheckpointError` for any other or a too large file."""
    try:
        require_small_header(path)
        with safe_open(str(path), framework="pt") as file:
            require_few_tensors(len(file.keys()), str(path))
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} is missing, truncated or not a safetensors file.",
            "Save the prompt again; other formats cannot be loaded.",
            error=f"{type(error).__name__}: {error}",
        ) from error


def parse_json(text: str | bytes, source: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object; raise a `CheckpointError` that names `source` for other text, and for one that is too large."""
    require_short_text(len(text), source, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} contains a JSON {type(content).__name__}; it must contain a JSON object.")
    require_flat(content, source)
    return content


def parse_json_tensor(tensor: Tensor, source: str) -> dict[str, Any]:
    """Parse a JSON object from a tensor that contains its text as bytes; raise a `CheckpointError` for any other tensor."""
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
        shape = list(tensor.shape)
        raise CheckpointError(
            f"the description in {source} is a tensor {shape} of {tensor.dtype}; it must be bytes of JSON."
        )
    require_short_text(len(tensor), source)
    return parse_json(tensor.cpu().numpy().tobytes(), source)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes; raise a `CheckpointError` if the file does not contain one."""
    try:
        require_size(path, limit)
        return parse_json(path.read_bytes(), str(path), limit)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
