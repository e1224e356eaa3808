"""Token ids for probe forwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import Stack
from softhooks.compat.offload import device_of


def probe_ids(model: nn.Module, vocabulary: int, columns: int, seed: int = 0) -> Tensor:
    """Make one row of ordinary ids that ends, where the model has one, in its end-of-text id. -> [1, columns]."""
    config = getattr(model, "config", None)
    inner = [own for own in vars(config).values() if hasattr(own, "to_dict")] if config is not None else []
    special = {getattr(model.get_input_embeddings(), "padding_idx", None)}  # type: ignore[operator]
    special = special.union(*(special_ids(one) for one in (config, *inner)))
    ordinary = [i for i in range(min(vocabulary, 64)) if i not in special] or [0]
    ids = [ordinary[(7 * seed + 3 * column) % len(ordinary)] for column in range(columns)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, list):
        end = end[0]
    if end is not None and end < vocabulary:
        ids[-1] = end
    return torch.tensor([ids], device=_device(model))


def special_ids(config: Any) -> set[int | None]:
    """The ids that a config gives a meaning: models count padding by its id, and look for the end of a text."""
    special: set[int | None] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, list) else [value])
    return special


def decoder_ids(ids: Tensor) -> Tensor:
    """Decoder ids that are as many as the encoder's (some heads ask for that) and not the same."""
    return ids.roll(1, dims=-1)


def _device(model: nn.Module) -> torch.device:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return device_of(embedding if isinstance(getattr(embedding, "weight", None), Tensor) else model)


CHOICES = 2


def as_choices(ids: Tensor, choices: int) -> Tensor:
    """Make every row a row of equal choices. [B, T] -> [B, C, T]."""
    return ids.unsqueeze(1).expand(-1, choices, -1).contiguous()


def ordinary_ids(model: nn.Module, stack: Stack, vocabulary: int) -> list[int]:
    """Ids, the lowest first, that neither a config nor an embedding sets apart."""
    special = {part.padding_idx for part in stack.module.modules() if isinstance(part, nn.Embedding)}
    config: Any = getattr(model, "config", None)
    for each in (config, text_config(config)):
        for name, value in vars(each).items() if each is not None else ():
            if name.endswith(("token_id", "token_ids", "_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return [i for i in range(min(vocabulary, 64)) if i not in special] or [0]


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model; the config itself if it has no such part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


SHORTEST = 24


_LONGEST_REACH = 128


_NAMES = ("window", "chunk", "compress", "conv", "kernel", "topk", "block", "stride", "pool")


def probe_length(module: nn.Module, room: int | None, prompt: int = 0) -> tuple[int, int]:
    """How many columns a probe of a stack takes, and a column before which nothing later may be seen.

    The column stands one before the end of a window, chunk or block: who looks too far ahead looks over it.

    Args:
        room: how many columns the model has positions for; None: as many as it takes.
        prompt: a text longer than the virtual tokens is wanted, within reason.
    """
    reach = reach_of(module)
    columns = max(SHORTEST, 2 * reach + 2, min(prompt + 8, 2 * SHORTEST))
    columns = columns if room is None else max(min(columns, room), 2)
    step = reach if reach < columns else 8
    cut = columns // 2 // step * step or min(step, columns)
    return columns, max(min(cut, columns) - 1, 1)


def reach_of(module: nn.Module) -> int:
    """The common multiple of the short distances that a stack's config names, or the longest of them. At least 8."""
    config = getattr(module, "config", None)
    found = {value for value in _distances(getattr(config, "__dict__", {})) if 2 <= value <= _LONGEST_REACH} | {8}
    multiple = math.lcm(*found)
    return multiple if multiple <= _LONGEST_REACH else max(found)


def _distances(values: dict[Any, Any], named: bool = False) -> Iterator[int]:
    for name, value in values.items():
        fits = named or any(part in str(name) for part in _NAMES)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, dict):
                yield from _distances(one, fits)
            elif fits and isinstance(one, int) and not isinstance(one, bool):
                yield one
