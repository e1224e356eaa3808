"""Rows that a script has added to a model's vocabulary (`resize_token_embeddings`), as far as they can be told from the others.

Resizing leaves little behind: the config says the new size. Two places may still say the old one: the config of the checkpoint
that the model was loaded from, and an attribute of the module inside, which transformers does not change.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
import weakref
from collections.abc import Container
from pathlib import Path
from typing import Any

from torch import nn

from softhooks.backbone.stack import ModelStructure
from softhooks.compat.peft import unwrapped
from softhooks.errors import PromptMismatchError

logger = logging.getLogger(__name__)

_said: weakref.WeakSet[object] = weakref.WeakSet()
_SMALL = 16 * 2**20  # no config is larger


def base_rows(model: nn.Module, structure: ModelStructure) -> int | None:
    """How many rows the vocabulary had before a script added some; None where nothing tells that it did."""
    plain: Any = unwrapped(model)
    config = getattr(plain, "config", None)
    rows = structure.vocabulary
    if config is None or _size(_text(config)) != rows:
        return None  # not what resizing leaves: the table has more rows than words for reasons of its own
    told = [_size_inside(plain, structure), _size_of_checkpoint(config)]
    known = [size for size in told if size is not None and 0 < size < rows]
    return min(known, default=None)


def _text(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _size(config: Any) -> int | None:
    size = config.get("vocab_size") if isinstance(config, dict) else getattr(config, "vocab_size", None)
    return size if type(size) is int else None


def _size_inside(model: nn.Module, structure: ModelStructure) -> int | None:
    """What a module inside that holds the embedding says of its size, as `LlamaModel.vocab_size`."""
    embedding = structure.entry.embedding
    sizes = [(size, m) for m in model.modules() if m is not model and type(size := m.__dict__.get("vocab_size")) is int]
    return min((size for size, holder in sizes if any(part is embedding for part in holder.modules())), default=None)


def _size_of_checkpoint(config: Any) -> int | None:
    """What the config of the checkpoint says, from a directory or from the cache; the hub is not asked."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    path = Path(str(name)) / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(str(name), "config.json", revision=getattr(config, "_commit_hash", None))
            if not isinstance(found, str):
                return None
            path = Path(found)
        told = json.loads(path.read_bytes()) if path.stat().st_size <= _SMALL else None
    except (OSError, ValueError, RecursionError):  # no file, no JSON, or no name of a repository
        return None
    if not isinstance(told, dict):
        return None
    text = told.get("text_config")
    sizes = [_size(told), _size(text) if isinstance(text, dict) else None]
    return next((size for size in sizes if size is not None), None)


def warn_of_added(model: nn.Module, structure: ModelStructure, covered: Container[int]) -> None:
    """Say that rows which a script has added are neither trained nor saved with a prompt.

    Args:
        covered: the ids whose rows are.
    """
    base = base_rows(model, structure)
    added = [] if base is None else [row for row in range(base, structure.vocabulary) if row not in covered]
    if added:
        warnings.warn(
            f"{len(added)} rows of the vocabulary ({added[0]} to {added[-1]}) were added by `resize_token_embeddings` and are in "
            "no checkpoint: they stay frozen, as they were drawn, and are not saved with the prompt; another process draws "
            "others. Pass `train_added_tokens=True` to `attach` to train and save them, or save the resized model.",
            UserWarning,
            stacklevel=stack_level(),
        )


def say_unsaved(prompt: object, name: str, model: nn.Module, structure: ModelStructure, saved: Container[int]) -> None:
    """Say once for a prompt, when it is saved, that rows which a script has added are not in its file.

    Args:
        saved: the ids whose rows are.
    """
    base = base_rows(model, structure)
    if base is None or prompt in _said:
        return
    _said.add(prompt)
    left_out = [row for row in range(base, structure.vocabulary) if row not in saved]
    if left_out:
        logger.warning(
            "%d rows of the vocabulary (%d to %d) were added by `resize_token_embeddings`; they are not in the file of "
            "the prompt %r: save the resized model too, or attach with `train_added_tokens=`.",
            len(left_out), left_out[0], left_out[-1], name,
        )  # fmt: skip


def stack_level() -> int:
    """How far up the first caller outside of this package is, for `warnings.warn`."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "softhooks":
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level


def require_rows(told: Any, structure: ModelStructure, source: str) -> None:
    """Refuse a base whose vocabulary is smaller than that of the base of a stored prompt.

    Raises:
        PromptMismatchError: naming both sizes.
    """
    if type(told) is int and structure.vocabulary < told:
        raise PromptMismatchError(
            "a prompt must enter a model whose vocabulary holds the words that it was trained with.",
            "Load the base model that it was trained with; if tokens were added then, add them and call "
            "`resize_token_embeddings` before.",
            prompt=f"{told} words ({source})",
            model=f"{structure.vocabulary} words",
        )
