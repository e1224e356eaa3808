"""Choose the token ids and lengths of the inputs for probe forwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import Stack
from softhooks.compat.offload import device_of

_MIN_COLUMNS = 24
_MAX_DISTANCE = 128
_DISTANCES = ("window", "chunk", "compress", "conv", "kernel", "topk", "block", "stride", "pool")
"""A config value whose name contains one of these may limit how far back a token attends."""


# --- ids --------------------------------------------------------------------------------------------------------------


def probe_ids(model: nn.Module, vocabulary: int, columns: int, seed: int = 0) -> Tensor:
    """Make one row of ids, [1, columns]; none is special except the last, the model's `eos_token_id` (if it has one)."""
    config = getattr(model, "config", None)
    inner = [own for own in vars(config).values() if hasattr(own, "to_dict")] if config is not None else []
    if not vocabulary:  # a model without token ids
        return torch.zeros(1, columns, dtype=torch.long, device=device_of(model))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    special = {getattr(embedding, "padding_idx", None)}.union(*(special_ids(one) for one in (config, *inner)))
    ordinary = [i for i in range(min(vocabulary, 64)) if i not in special] or [0]
    ids = [ordinary[(7 * seed + 3 * column) % len(ordinary)] for column in range(columns)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, list):
        end = end[0]
    if end is not None and end < vocabulary:
        ids[-1] = end
    device = device_of(embedding if isinstance(getattr(embedding, "weight", None), Tensor) else model)
    return torch.tensor([ids], device=device)


def special_ids(config: Any) -> set[int | None]:
    """Return the special token ids in a config; models may use them to find padding or the end of the text."""
    special: set[int | None] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, list) else [value])
    return special


def ordinary_ids(model: nn.Module, stack: Stack, vocabulary: int) -> list[int]:
    """List, in ascending order, the ids below 64 that are neither special ids in the configs nor an embedding's padding index."""
    special = {part.padding_idx for part in stack.module.modules() if isinstance(part, nn.Embedding)}
    config: Any = getattr(model, "config", None)
    for each in (config, text_config(config)):
        for name, value in vars(each).items() if each is not None else ():
            if name.endswith(("token_id", "token_ids", "_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return [i for i in range(min(vocabulary, 64)) if i not in special] or [0]


def text_config(config: Any) -> Any:
    """Return the text model's part of a config, or the whole config if it has no such part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# --- length -----------------------------------------------------------------------------------------------------------


def probe_length(module: nn.Module, max_columns: int | None, prompt: int = 0) -> tuple[int, int]:
    """Choose the number of tokens for a test of causality, and the index of the first token that the test changes.

    That token ends a window, chunk or block, so that the test notices if earlier tokens of the same block attend to it.

    Args:
        max_columns: the number of positions of the model, or None if it is unlimited.
        prompt: the number of virtual tokens. The text is longer than the prompt, up to a limit.
    """
    distance = longest_distance(module)
    columns = max(_MIN_COLUMNS, 2 * distance + 2, min(prompt + 8, 2 * _MIN_COLUMNS))
    columns = columns if max_columns is None else max(min(columns, max_columns), 2)
    step = distance if distance < columns else 8
    cut = columns // 2 // step * step or min(step, columns)
    return columns, max(min(cut, columns) - 1, 1)


def longest_distance(module: nn.Module) -> int:
    """Return the least common multiple of 8 and the window and chunk sizes in a stack's config.

    Sizes above `_MAX_DISTANCE` are ignored. If the multiple exceeds this limit, return the largest of these sizes and 8 instead.
    """
    config = getattr(module, "config", None)
    found = {value for value in _distances(getattr(config, "__dict__", {})) if 2 <= value <= _MAX_DISTANCE} | {8}
    multiple = math.lcm(*found)
    return multiple if multiple <= _MAX_DISTANCE else max(found)


def _distances(values: dict[Any, Any], named: bool = False) -> Iterator[int]:
    for name, value in values.items():
        fits = named or any(part in str(name) for part in _DISTANCES)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, dict):
                yield from _distances(one, fits)
            elif fits and isinstance(one, int) and not isinstance(one, bool):
                yield one
