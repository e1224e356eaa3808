"""Facts about each virtual token of a saved prompt: its norm, its similarity to the others, its drift, and its gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.errors import PromptMismatchError
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.runtime.slot_statistics import drift, similarities, slot_tables, table_norms

_GATES, _PROMPTS = "_gates", "_prompts"


def slots_of(
    stored: StoredPrompt, method: Method, initial: StoredPrompt | None = None, *, matrix: bool = False
) -> list[dict[str, Any]]:
    """Describe the rows of each tensor that has one row for each virtual token.

    Args:
        initial: the prompt before training, or None if it is not known.
        matrix: also return the similarity of each row to each other row.

    Raises:
        PromptMismatchError: `initial` has other tensors.
    """
    tables = slot_tables(stored.tables, method.num_virtual_tokens)
    starts = {} if initial is None else _starts(tables, initial, stored.source)
    found = []
    for name, table in sorted(tables.items()):
        similar = similarities(table)
        one: dict[str, Any] = {
            "tensor": name,
            "norms": table_norms(table).tolist(),
            "most_similar": _most_similar(similar),
            "drift": None if name not in starts else _drift(table, starts[name]),
        }
        found.append(one | ({"similarity": similar.tolist()} if matrix else {}))
    return found


def _starts(tables: dict[str, Tensor], initial: StoredPrompt, source: str) -> dict[str, Tensor]:
    shapes = {name: list(table.shape) for name, table in tables.items()}
    others = {name: list(initial.tables[name].shape) for name in tables if name in initial.tables}
    if shapes != others:
        raise PromptMismatchError(
            "the initial prompt has other tensors than the prompt, so no drift can be computed.",
            "Give a prompt of the same run, such as its first checkpoint, with --initial.",
            prompt=f"{source}: {shapes}",
            initial=f"{initial.source}: {others or 'none of these tensors'}",
        )
    return {name: initial.tables[name] for name in tables}


def _drift(table: Tensor, start: Tensor) -> dict[str, list[float]]:
    distance, cosine = drift(table, start)
    return {"distance": distance.tolist(), "cosine": cosine.tolist()}


def _most_similar(similar: Tensor) -> list[dict[str, Any]] | None:
    """Return, for each row, the other row with the highest cosine similarity; None if there is only one row."""
    if len(similar) < 2:
        return None
    others = similar.masked_fill(torch.eye(len(similar), dtype=torch.bool), -torch.inf).max(dim=1)
    pairs = zip(others.indices.tolist(), others.values.tolist(), strict=True)
    return [{"slot": slot, "cosine": cosine} for slot, cosine in pairs]


def gates_of(stored: StoredPrompt, method: Method) -> list[dict[str, Any]]:
    """Return the factors of a LLaMA-Adapter's gated branches by layer; an empty list for other methods.

    The factor is tanh(g), or g itself with `gate="raw"`. For each layer, the mean and the largest absolute value over its heads
    are returned.
    """
    found = []
    for name, table in sorted(stored.tables.items()):
        prompts = stored.tables.get(name.removesuffix(_GATES) + _PROMPTS)
        if not name.endswith(_GATES) or prompts is None:
            continue
        options: Any = method
        layers = len(prompts) // method.num_virtual_tokens + options.early_fusion
        values = (table.tanh() if options.gate == "tanh" else table).flatten().abs()
        if layers == 0 or len(values) % layers:  # the layers have different numbers of heads
            found.append({"stack": name.removesuffix(_GATES), "mean": None, "largest": [float(values.max())]})
            continue
        by_layer = values.view(layers, -1)
        mean, largest = by_layer.mean(1).tolist(), by_layer.amax(1).tolist()
        found.append({"stack": name.removesuffix(_GATES), "mean": mean, "largest": largest})
    return found
