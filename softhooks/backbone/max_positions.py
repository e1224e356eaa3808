"""Warn if prompt and text together are longer than the rotary embeddings support: the model runs, but its outputs get worse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from softhooks.backbone.stack import ModelStructure, Positions
from softhooks.errors import format_message
from softhooks.patching.patches import Patches


def rotary_limit(module: nn.Module) -> int | None:
    """Return the number of positions that a stack's rotary embeddings support; None if unlimited or not rotary.

    With `linear` scaling, `max_position_embeddings` is the length before scaling; otherwise it may be the scaled length.
    """
    config = getattr(module, "config", None)
    trained = getattr(config, "max_position_embeddings", None)
    rotates = any("inv_freq" in name for name, _ in module.named_buffers())
    rotates = rotates and not getattr(config, "alibi", False)  # Falcon with ALiBi has the buffer, but does not rotate
    if not isinstance(trained, int) or not rotates:
        return None
    scaled: Any = getattr(config, "rope_parameters", None)
    scaled = scaled if isinstance(scaled, dict) else {}
    if scaled.get("rope_type") == "dynamic":  # adapts to any length
        return None
    factor, original = scaled.get("factor"), scaled.get("original_max_position_embeddings")
    if original is None and scaled.get("rope_type") == "linear":
        original = trained
    if isinstance(factor, (int, float)) and isinstance(original, int):
        return max(trained, int(factor * original))
    return trained


def dynamic_rope_length(module: nn.Module) -> int | None:
    """Return the length above which the frequencies of all rotary positions change (dynamic RoPE, LongRoPE)."""
    lengths = []
    for part in module.modules():
        kinds, config = getattr(part, "rope_type", None), getattr(part, "config", None)
        parameters = getattr(config, "rope_parameters", None)
        if kinds is None or not isinstance(parameters, dict):
            continue
        by_layer_type = [(kinds[k], parameters[k]) for k in kinds] if isinstance(kinds, dict) else [(kinds, parameters)]
        for kind, own in by_layer_type:
            if kind == "longrope":
                lengths.append(own["original_max_position_embeddings"])
            elif "dynamic" in kind:
                lengths.append(part.original_max_seq_len)
    return min(lengths, default=None)


def warn_beyond(positions: Positions, text: int, length: int) -> None:
    """Warn once per model if `length` virtual tokens and `text` tokens (without padding) together exceed `rotary_limit`."""
    limit = positions.rotary_limit
    if limit is None or positions.has_warned or text + length <= limit or torch.compiler.is_compiling():
        return
    positions.has_warned = True
    warnings.warn(
        format_message(
            f"prompt and text together have {text + length} tokens, more than the model was trained for, so its outputs "
            "get worse.",
            "Truncate the text, use a shorter prompt, or scale the model's rotary embeddings (`rope_parameters`).",
            prompt=length,
            text=text,
            max_position_embeddings=limit,
        ),
        UserWarning,
        stacklevel=2,
    )


@contextmanager
def without_position_warning(structure: ModelStructure) -> Iterator[None]:
    """Suppress the warning in the `with` block, which runs the model on inputs that the user did not choose."""
    with Patches() as patches:
        for stack in structure.stacks:
            patches.set(stack.positions, "has_warned", True)
        yield
