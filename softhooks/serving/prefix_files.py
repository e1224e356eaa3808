"""Files with the keys and values of a prompt, `NAME.safetensors`, which `softhooks export` writes and a server reads.

A file holds `layers.N.key` and `layers.N.value`, [P, Hk, D], and in its metadata the facts as JSON and a digest of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks.errors import CheckpointError, OptionError, is_int
from softhooks.formats.files import parse_json, read_tensors, write_tensors
from softhooks.serving.prefix import Prefix, PrefixFacts

FORMAT = "softhooks-prefix-1"
SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_name(name: object) -> str:
    """Return a name by which requests select a prompt.

    Raises:
        OptionError: the name is not a string of letters, digits, dots, underscores and hyphens.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise OptionError(
        f"the name of a prompt is {name!r}; it must start with a letter or a digit, and contain at most 128 letters, digits, "
        "dots, underscores and hyphens."
    )


def prefix_file(folder: Path, name: str) -> Path:
    """Return the path of a prompt's file in a directory of exported prompts."""
    return folder / f"{check_name(name)}{SUFFIX}"


def write_prefix(folder: Path, name: str, prefix: Prefix) -> Path:
    """Write a prefix atomically, and return the path. A running server finds the new file by itself."""
    path = prefix_file(folder, name)
    tensors = _tensors(prefix)
    about = {"format": FORMAT, "facts": json.dumps(asdict(prefix.facts)), "digest": digest(prefix)}
    write_tensors(path, tensors, about)
    return path


def read_prefix(path: Path) -> tuple[Prefix, str]:
    """Read a prefix and its digest, and check that the tensors fit the facts and the digest.

    Raises:
        CheckpointError: the file is missing or damaged, or was not written by `softhooks export`.
    """
    tensors, about = read_tensors(path)
    if about.get("format") != FORMAT:
        raise _damaged(path, f"its format is {about.get('format')!r}, not {FORMAT!r}")
    facts = _facts(parse_json(about.get("facts", ""), f"the metadata of {path}"), path)
    expected = {
        f"layers.{layer}.{part}": (facts.num_virtual_tokens, facts.heads[layer], dims[layer])
        for layer in range(facts.layers)
        for part, dims in (("key", facts.key_dims), ("value", facts.value_dims))
    }
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise _damaged(path, "its tensors differ from those that its metadata announces")
    if any(tensor.dtype not in _DTYPES for tensor in tensors.values()):
        raise _damaged(path, "its tensors are not float32, bfloat16 or float16")
    prefix = Prefix(
        facts,
        tuple(tensors[f"layers.{layer}.key"] for layer in range(facts.layers)),
        tuple(tensors[f"layers.{layer}.value"] for layer in range(facts.layers)),
    )
    found = digest(prefix)
    if about.get("digest") != found:
        raise _damaged(path, "its tensors do not have the recorded digest")
    return prefix, found


def digest(prefix: Prefix) -> str:
    """Return a SHA-256 digest of the facts and the tensors, which distinguishes the prefix in a server's cache."""
    result = hashlib.sha256(json.dumps(asdict(prefix.facts), sort_keys=True).encode())
    for name, tensor in _tensors(prefix).items():
        result.update(f"{name} {tensor.dtype}".encode())
        result.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _tensors(prefix: Prefix) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"layers.{layer}.key"], tensors[f"layers.{layer}.value"] = key, value
    return tensors


def _facts(given: dict[str, Any], path: Path) -> PrefixFacts:
    """Check the facts of a file."""
    if set(given) != {field.name for field in fields(PrefixFacts)}:
        raise _damaged(path, "its metadata is incomplete")
    lists = {name: given[name] for name in ("heads", "key_dims", "value_dims")}
    sound = (
        all(isinstance(given[name], str) for name in ("method", "model_type"))
        and all(is_int(given[name], 1) for name in ("num_virtual_tokens", "vocabulary"))
        and isinstance(given["windowed"], bool)
        and all(isinstance(numbers, list) and numbers for numbers in lists.values())
        and len({len(numbers) for numbers in lists.values()}) == 1
        and all(is_int(number, 1) for numbers in lists.values() for number in numbers)
    )
    if not sound:
        raise _damaged(path, "its metadata has values of the wrong type")
    return PrefixFacts(**{**given, **{name: tuple(numbers) for name, numbers in lists.items()}})


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a prompt that was exported for a server: {reason}.",
        "Write it with `softhooks export PROMPT --to SERVER --model MODEL --output DIR`.",
    )
