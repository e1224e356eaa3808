"""Write a prompt to the files of softhooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from softhooks._version import __version__
from softhooks.formats.files import write_json, write_tensors
from softhooks.formats.stored import ADDED, FORMAT, FORMAT_VERSION, HEAD, PROMPT, Stored

DESCRIPTION = "soft_prompt.json"


TENSORS = "soft_prompt.safetensors"


def write_stored(stored: Stored, folder: Path) -> None:
    """Write a prompt that may be on no model."""
    tensors = {PROMPT + group: table for group, table in stored.tables.items()}
    for path, state in stored.heads.items():
        for name, value in state.items():
            tensors[f"{HEAD}{path}:{name}"] = value
    tensors |= {ADDED + name: table for name, table in stored.added.items()}
    description = describe(stored)
    description["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / TENSORS, tensors, {"format": "pt", FORMAT: json.dumps(description)})
    known = description["base"].get("fingerprint")
    if known is not None:  # its numbers say nothing to people
        description["base"] = {**description["base"], "fingerprint": known["digest"]}
    write_json(folder / DESCRIPTION, description)


def describe(stored: Stored) -> dict[str, Any]:
    """Say everything about a prompt but its numbers."""
    labels = None if stored.labels is None else stored.labels.described(stored.heads)
    return {
        **({} if labels is None else {"labels": labels}),
        **({"added_tokens": list(stored.added_ids)} if stored.added_ids else {}),
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": stored.method.kind,
        "options": stored.method.options(),
        "conventions": stored.conventions,
        "heads": list(stored.heads),
        "also_trained": stored.also_trained,
        "base": {**stored.base, "stacks": stored.stacks},
        "versions": {
            "softhooks": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
