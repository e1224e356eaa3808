"""Compare two saved prompts: their settings, their base models, and their tensors row by row."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from softhooks.base_model.compare import FOUND, compare
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods.stored_method import method_of
from softhooks.runtime.slot_statistics import drift, similarities, table_norms


def compare_prompts(one: StoredPrompt, other: StoredPrompt) -> dict[str, Any]:
    """Compare two prompts, and return JSON values; NaN and infinity become strings."""
    found = {
        "base": _bases(one, other),
        "settings": _settings(one, other),
        "tensors": [
            _tables(name, one.tables.get(name), other.tables.get(name))
            for name in dict.fromkeys([*one.tables, *other.tables])
        ],
        "heads": [_heads(path, one, other) for path in dict.fromkeys([*one.heads, *other.heads])],
    }
    plain: dict[str, Any] = json.loads(json.dumps(found), parse_constant=str)
    return plain


# --- settings ---------------------------------------------------------------------------------------------------------


def _bases(one: StoredPrompt, other: StoredPrompt) -> dict[str, Any]:
    """Return whether the base models are the same; `same` is None if the files do not show it."""
    then, now = one.base.fingerprint, other.base.fingerprint
    if then is None or now is None:
        lacking = one.source if then is None else other.source
        return {"same": None, "finding": f"not known, because {lacking} has no fingerprint of its base model"}
    finding = compare(then, now)
    return {"same": finding == "same", "finding": FOUND[finding]}


def _settings(one: StoredPrompt, other: StoredPrompt) -> list[dict[str, Any]]:
    """Return the settings that differ."""
    left, right = _described(one, method_of(one)), _described(other, method_of(other))
    names = dict.fromkeys([*left, *right])
    return [
        {"name": name, "a": left.get(name), "b": right.get(name)} for name in names if left.get(name) != right.get(name)
    ]


def _described(stored: StoredPrompt, method: Method) -> dict[str, Any]:
    base, given = stored.base, stored.options
    options = method.options()
    options |= {name: given[name] for name in method.init_options if name in given}
    return {
        "method": stored.kind,
        **options,
        **{f"convention {name}": value for name, value in stored.conventions.items()},
        "base class": base.class_name or base.task,
        "base": base.name_or_path or None,
        "base revision": base.revision,
        "base quantization": base.quantization,
        "heads": list(stored.heads),
        "also trained": stored.also_trained,
        "added tokens": list(stored.added_ids),
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tables(name: str, one: Tensor | None, other: Tensor | None) -> dict[str, Any]:
    """Compare the rows of a tensor; `rows` is None if they have different widths, or if one prompt does not have the tensor."""
    shapes = [None if table is None else list(table.shape) for table in (one, other)]
    if one is None or other is None or one.dim() != 2 or one.shape[1:] != other.shape[1:]:
        return {"name": name, "shapes": shapes, "equal": False, "rows": None}
    count = min(len(one), len(other))
    distance, cosine = drift(other[:count], one[:count])
    near = similarities(one, other).max(dim=1)
    norms = table_norms(one), table_norms(other)
    rows = [
        {
            "norms": [float(norms[0][row]), float(norms[1][row])],
            "cosine": float(cosine[row]),
            "distance": float(distance[row]),
            "most_similar": {"slot": int(near.indices[row]), "cosine": float(near.values[row])},
        }
        for row in range(count)
    ]
    return {"name": name, "shapes": shapes, "equal": torch.equal(one, other), "rows": rows}


def _heads(path: str, one: StoredPrompt, other: StoredPrompt) -> dict[str, Any]:
    """Compare the heads at a path; `difference` is the largest difference of two numbers, or None if they do not correspond."""
    left, right = one.heads.get(path), other.heads.get(path)
    if left is None or right is None or {n: t.shape for n, t in left.items()} != {n: t.shape for n, t in right.items()}:
        return {"path": path, "difference": None}
    gaps = [float((left[name].float() - right[name].float()).abs().max()) for name in left if left[name].numel()]
    return {"path": path, "difference": max(gaps, default=0.0)}
