"""Read the facts about a saved prompt that `softhooks inspect` prints."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks.analysis.slots import gates_of, slots_of
from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.formats import peft_read, softhooks_files
from softhooks.formats.files import parse_json, parse_json_tensor, read_json, read_tensors
from softhooks.formats.find import format_of, is_checkpoint, read
from softhooks.formats.softhooks_files import LIVE
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods.stored_method import method_of
from softhooks.prompt_encoder import EMBEDDINGS

INITIAL = "initial"
"""The directory in which `softhooks train` saves the prompt before training."""


@dataclass(frozen=True)
class Questions:
    """What `softhooks inspect` finds out in addition to the contents of the files.

    Attributes:
        initial: the prompt before training; by default, the directory `initial` of the training run.
        model: the base model, or None to load none.
        words: the number of nearest words of each virtual token.
        text: the text on which attention is measured; None for a built-in one.
        strict: whether to refuse another base model.
        matrix: whether to return all similarities of virtual tokens.
    """

    initial: Path | None = None
    model: str | None = None
    words: int = 5
    text: str | None = None
    strict: bool = True
    matrix: bool = False


def facts_of(folder: Path, questions: Questions | None = None) -> dict[str, Any]:
    """Describe a saved prompt with values that JSON supports; NaN and infinity become strings."""
    asked = questions or Questions()
    stored = read(folder)
    method = method_of(stored)
    is_native = format_of(folder) == "softhooks"
    file = folder / (softhooks_files.TENSORS if is_native else peft_read.TENSORS)
    tensors, metadata = read_tensors(file)
    if is_native:
        versions = parse_json(metadata[softhooks_files.FORMAT], str(file)).get("versions")
    else:
        versions = {"peft": read_json(folder / peft_read.CONFIG).get("peft_version")}
    in_heads = sum(tensor.numel() for head in stored.heads.values() for tensor in head.values())
    live = _live(folder)
    facts = {
        "path": str(folder),
        "format": "softhooks" if is_native else "peft",
        "name": live and live.pop("name"),
        "method": stored.kind,
        "class": type(method).__name__,
        "num_virtual_tokens": method.num_virtual_tokens,
        "options": _options(stored, method),
        "conventions": stored.conventions,
        "base": _base(stored),
        "versions": {k: v for k, v in versions.items() if isinstance(v, str)} if isinstance(versions, dict) else {},
        "heads": list(stored.heads),
        "also_trained": stored.also_trained,
        "loaded_from": stored.loaded_from and stored.loaded_from.to_json(),
        "parameters": {"prompt": sum(tensor.numel() for tensor in tensors.values()) - in_heads, "heads": in_heads},
        "file": file.name,
        "bytes": file.stat().st_size,
        "tensors": [_tensor(name, tensor) for name, tensor in sorted(tensors.items())],
        "live": live,
        "gates": gates_of(stored, method),
        **_slots(folder, stored, method, asked),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts), parse_constant=str)
    return plain


def _slots(folder: Path, stored: StoredPrompt, method: Method, asked: Questions) -> dict[str, Any]:
    """Describe the virtual tokens, and what they do on the base model if it is given."""
    path = asked.initial or _initial_of(folder)
    initial = None if path is None else read(path)
    source, on_model = None if initial is None else str(path), None
    if asked.model is not None:
        from softhooks.analysis.on_model import TEXT, PromptOnBase  # imports transformers

        base = PromptOnBase(stored, asked.model, strict=asked.strict)
        on_model = base.facts(asked.words, asked.text or TEXT)
        rows = None if initial is not None else base.start_rows()
        if rows is not None:
            initial, source = replace(stored, tables={EMBEDDINGS: rows}), "the words that initialized it"
    slots = slots_of(stored, method, initial, matrix=asked.matrix)
    return {"slots": slots, "drift_from": source, "on_model": on_model}


def _initial_of(folder: Path) -> Path | None:
    """Return the directory in which `softhooks train` saved the prompt before training; None if there is none."""
    run = folder.parent.parent if is_checkpoint(folder) else folder
    return run / INITIAL if format_of(run / INITIAL) is not None else None


def _options(stored: StoredPrompt, method: Method) -> dict[str, Any]:
    """Return the method's options; those for initialization come from the file, because `method_of` leaves them out."""
    options = {key: value for key, value in method.options().items() if key not in method.init_options}
    given = stored.options
    return options | {key: given[key] for key in method.init_options if key in given and _is_flat(given[key])}


def _is_flat(value: object) -> bool:
    """Whether an option's value has one of the types that softhooks writes."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in parts)


def _base(stored: StoredPrompt) -> dict[str, Any]:
    base = stored.base
    return {
        "class": base.class_name or None,
        "task": base.task or None,
        "name_or_path": base.name_or_path or None,
        "revision": base.revision,
        "digest": base.fingerprint and base.fingerprint.digest,
        "width": base.width,
        "vocabulary": base.vocabulary,
        "slides": base.sliding_window,
        "stacks": stored.stacks,
    }


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """Describe a tensor; a vector is treated as one row, and an empty tensor has no norms."""
    numbers = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # few operations support 8-bit floats
    rows = numbers.reshape(-1, numbers.shape[-1]) if tensor.numel() and tensor.dim() else numbers.reshape(1, -1)
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64) if tensor.numel() else None
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "row_norms": None if norms is None else [float(norms.min()), float(norms.max())],
    }


def _live(folder: Path) -> dict[str, Any] | None:
    """Describe the file from which training resumes, and add the prompt's name; return None if there is no such file."""
    path = folder / LIVE
    if not path.is_file():
        return None
    tensors, _ = read_tensors(path)
    name, optimizer = None, None
    for key in [key for key in tensors if is_prompt_key(key) and key.endswith(".description")]:
        if tensors[key].dtype is torch.uint8 and tensors[key].dim() == 1:
            name = key[len(CONTAINER) + 1 : -len(".description")]
            optimizer = parse_json_tensor(tensors.pop(key), str(path)).get("optimizer")
    return {
        "name": name,
        "file": LIVE,
        "bytes": path.stat().st_size,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "optimizer": optimizer if isinstance(optimizer, str) else None,
        "tensors": {key: list(tensor.shape) for key, tensor in sorted(tensors.items())},
    }
