"""softhooks' own files: `soft_prompt.safetensors`, and `soft_prompt.json` for people to read.

The safetensors file contains the folded prompt, its heads and the embeddings of added tokens as tensors, and everything else as
metadata, so a single rename completes a save. `soft_prompt.json` repeats the metadata and is never read by softhooks.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks._version import __version__
from softhooks.base_model.info import BaseModelInfo
from softhooks.errors import CheckpointError
from softhooks.formats.files import parse_json, read_tensors, write_json, write_tensors
from softhooks.formats.hub_commit import HubCommit
from softhooks.formats.labels import read_labels
from softhooks.formats.stored import StoredPrompt
from softhooks.prompt_encoder import TableEncoder

TENSORS = "soft_prompt.safetensors"
DESCRIPTION = "soft_prompt.json"
LIVE = "soft_prompt.live.safetensors"
"""The file in a checkpoint with the trained parameters, from which training resumes."""
FORMAT = "softhooks"
"""The key of the description in the file's metadata."""

_VERSION = 1
_PROMPT, _HEAD, _ADDED = "prompt.", "head.", "added."
"""The prefixes of tensor names."""

_STACKS = ({"text"}, {"encoder", "decoder"})
_ROLES = ("self", "cross")
_ADDED_DIMS = {"rows": 2, "output_rows": 2, "output_bias": 1}


# --- write ------------------------------------------------------------------------------------------------------------


def write(stored: StoredPrompt, folder: Path) -> None:
    """Write a prompt; each file is written atomically."""
    tensors = {_PROMPT + group: table for group, table in stored.tables.items()}
    for path, state in stored.heads.items():
        for name, value in state.items():
            tensors[f"{_HEAD}{path}:{name}"] = value
    tensors |= {_ADDED + name: table for name, table in stored.added.items()}
    description = _describe(stored)
    description["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / TENSORS, tensors, {"format": "pt", FORMAT: json.dumps(description)})
    if stored.base.fingerprint is not None:  # the digest is enough for people
        description["base"]["fingerprint"] = stored.base.fingerprint.digest
    write_json(folder / DESCRIPTION, description)


def _describe(stored: StoredPrompt) -> dict[str, Any]:
    labels = None if stored.labels is None else stored.labels.described(stored.heads)
    return {
        **({} if labels is None else {"labels": labels}),
        **({"added_tokens": list(stored.added_ids)} if stored.added_ids else {}),
        **({} if stored.loaded_from is None else {"loaded_from": stored.loaded_from.to_json()}),
        "format": FORMAT,
        "format_version": _VERSION,
        "method": stored.kind,
        "options": stored.options,
        "conventions": stored.conventions,
        "heads": list(stored.heads),
        "also_trained": stored.also_trained,
        "base": {**stored.base.to_json(), "stacks": stored.stacks},
        "versions": {
            "softhooks": __version__,
            "transformers": importlib.metadata.version("transformers"),
            "torch": torch.__version__,
        },
    }


# --- read -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> StoredPrompt:
    """Read `soft_prompt.safetensors`; raise a `CheckpointError` if it is damaged, of another format or inconsistent."""
    tensors, metadata = read_tensors(path)
    source = str(path)
    if FORMAT not in metadata:
        raise CheckpointError(f"{source} was not written by softhooks: its metadata has no entry {FORMAT!r}.")
    description = parse_json(metadata[FORMAT], source)
    version = description.get("format_version")
    if version != _VERSION:
        raise CheckpointError(
            f"{source} has format version {version!r}; the installed softhooks reads version {_VERSION}. Upgrade softhooks."
        )
    if description.get("tensors") != {name: list(tensor.shape) for name, tensor in tensors.items()}:
        raise CheckpointError(f"the tensors in {source} differ in name or shape from their description in the file.")
    tables, heads, added = _sort(tensors, source)
    base = description["base"] if isinstance(description.get("base"), dict) else {}

    def entry(values: dict[str, Any], key: str, rule: str, is_valid: Callable[[Any], bool]) -> Any:
        value = values.get(key)
        if not is_valid(value):
            raise CheckpointError(f"{key!r} in {source} is {value!r}; it must be {rule}.", "Save the prompt again.")
        return value

    stored = StoredPrompt(
        entry(description, "method", "a string", lambda kind: isinstance(kind, str)),
        entry(description, "options", "a JSON object", lambda options: isinstance(options, dict)),
        tables,
        heads,
        entry(description, "conventions", "a JSON object", lambda conventions: isinstance(conventions, dict)),
        source,
        entry(base, "stacks", "a description of each stack of the base model", _are_outlines),
        BaseModelInfo.from_json(base, source),
        entry(description, "also_trained", "a list of names", _are_names),
        labels=read_labels(description.get("labels"), heads, source),
        added=added,
        added_ids=_read_ids(description.get("added_tokens"), added, source),
        loaded_from=HubCommit.from_json(description.get("loaded_from"), source),
    )
    stored.require_finite()
    return stored


def _sort(
    tensors: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Divide the tensors into those of the prompt, those of the heads, and those of the added tokens."""
    tables: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    added: dict[str, Tensor] = {}
    taken = TableEncoder({})  # a table becomes an attribute of an encoder, and must not replace an existing attribute
    for name, tensor in tensors.items():
        group = name.removeprefix(_PROMPT)
        if name.startswith(_PROMPT) and group.isidentifier() and not hasattr(taken, group) and tensor.dim() == 2:
            tables[group] = tensor
        elif name.startswith(_HEAD) and ":" in name:
            head, parameter = name.removeprefix(_HEAD).split(":", 1)
            heads.setdefault(head, {})[parameter] = tensor
        elif name.startswith(_ADDED):
            added[name.removeprefix(_ADDED)] = tensor
        else:
            shape = list(tensor.shape)
            raise CheckpointError(
                f"{source} contains the tensor {name!r} {shape}, which belongs neither to a prompt nor to its heads."
            )
    return tables, heads, added


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_outlines(stacks: Any) -> bool:
    """Return whether a value has the form of an `outline` of a model; the attention shapes may be missing."""
    return isinstance(stacks, dict) and set(stacks) in _STACKS and all(map(_is_outline, stacks.values()))


def _is_outline(stack: Any) -> bool:
    if not isinstance(stack, dict) or not isinstance(stack.get("causal"), bool) or set(stack) - {"causal", *_ROLES}:
        return False
    runs = [stack[role] for role in _ROLES if role in stack]
    return all(isinstance(run, list) for run in runs) and all(_is_run(one) for run in runs for one in run)


def _is_run(run: Any) -> bool:
    return isinstance(run, list) and len(run) == 4 and all(type(number) is int and number > 0 for number in run)


def _read_ids(ids: Any, rows: dict[str, Tensor], source: str) -> tuple[int, ...]:
    """Read the ids of added tokens, and check that the file has a row for each of them."""
    if ids is None and not rows:
        return ()
    is_sound = (
        isinstance(ids, list)
        and all(type(number) is int and number >= 0 for number in ids)
        and 0 < len(ids) == len(set(ids))
        and "rows" in rows
        and all(
            name in _ADDED_DIMS and table.dim() == _ADDED_DIMS[name] and len(table) == len(ids)
            for name, table in rows.items()
        )
    )
    if not is_sound:
        raise CheckpointError(
            f"{source} does not have one row for each added token.",
            "Save the prompt again.",
            tokens=ids,
            rows={name: list(table.shape) for name, table in rows.items()},
        )
    return tuple(ids)
