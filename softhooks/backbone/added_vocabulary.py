"""Find the rows that `resize_token_embeddings` added to an embedding matrix, and warn that no checkpoint contains them.

Resizing updates the model's config; the old size may remain in the checkpoint's config and in an inner module's `vocab_size`.
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

from softhooks.backbone.probe_inputs import text_config
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.peft import unwrapped
from softhooks.errors import PromptMismatchError

logger = logging.getLogger(__name__)

_warned: weakref.WeakSet[object] = weakref.WeakSet()
_MAX_CONFIG_BYTES = 16 * 2**20


# --- finding them -----------------------------------------------------------------------------------------------------


def original_vocabulary(model: nn.Module, structure: ModelStructure) -> int | None:
    """Return the vocabulary size before resizing, or None if there is no sign of resizing."""
    plain: Any = unwrapped(model)
    config = getattr(plain, "config", None)
    rows = structure.vocabulary
    if config is None or _size(text_config(config)) != rows:
        return None  # the matrix differs from the config for a reason other than resizing
    sizes = [_size_of_inner_module(plain, structure), _size_of_checkpoint(config)]
    return min((size for size in sizes if size is not None and 0 < size < rows), default=None)


def _size(config: Any) -> int | None:
    size = config.get("vocab_size") if isinstance(config, dict) else getattr(config, "vocab_size", None)
    return size if type(size) is int else None


def _size_of_inner_module(model: nn.Module, structure: ModelStructure) -> int | None:
    """Read `vocab_size` from an inner module that contains the embedding, such as `LlamaModel`."""
    embedding = structure.entry.embedding
    sizes = [(size, m) for m in model.modules() if m is not model and type(size := m.__dict__.get("vocab_size")) is int]
    return min((size for size, holder in sizes if any(part is embedding for part in holder.modules())), default=None)


def _size_of_checkpoint(config: Any) -> int | None:
    """Read the vocabulary size from the checkpoint's config in a local directory or the Hub cache, without downloading it."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    path = Path(str(name)) / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(str(name), "config.json", revision=getattr(config, "_commit_hash", None))
            if not isinstance(cached, str):
                return None
            path = Path(cached)
        values = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):  # no file, invalid JSON, or not a repository name
        return None
    if not isinstance(values, dict):
        return None
    size, text = _size(values), values.get("text_config")
    return _size(text) if size is None and isinstance(text, dict) else size


# --- warnings ---------------------------------------------------------------------------------------------------------


def _added_rows(model: nn.Module, structure: ModelStructure, own: Container[int]) -> list[int]:
    base = original_vocabulary(model, structure)
    return [] if base is None else [row for row in range(base, structure.vocabulary) if row not in own]


def warn_about_added_rows(model: nn.Module, structure: ModelStructure, own: Container[int]) -> None:
    """Warn about added rows, except those whose ids are in `own`, which are trained with the prompt."""
    added = _added_rows(model, structure, own)
    if added:
        warnings.warn(
            f"{len(added)} embedding rows ({added[0]} to {added[-1]}) were added by `resize_token_embeddings`, and no checkpoint "
            "contains them: they stay frozen at random initial values, which differ between processes, and are not saved with "
            "the prompt. Pass `train_added_tokens=True` to `attach` to train and save them, or save the resized model.",
            UserWarning,
            stacklevel=stack_level(),
        )


def log_unsaved_rows(
    prompt: object, name: str, model: nn.Module, structure: ModelStructure, own: Container[int]
) -> None:
    """Log a warning, once per prompt, if the prompt's file lacks added rows; it contains only those whose ids are in `own`."""
    if prompt in _warned:
        return
    missing = _added_rows(model, structure, own)
    if missing:
        _warned.add(prompt)
        logger.warning(
            "%d embedding rows (%d to %d) were added by `resize_token_embeddings` and are not in the file of "
            "the prompt %r: save the resized model too, or attach with `train_added_tokens=`.",
            len(missing), missing[0], missing[-1], name,
        )  # fmt: skip


def stack_level() -> int:
    """Return the `stacklevel` that makes `warnings.warn` point to the first caller outside softhooks."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "softhooks":
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level


def require_vocabulary(rows: Any, structure: ModelStructure, source: str) -> None:
    """Raise an error if the vocabulary is smaller than that of a saved prompt's base model.

    Args:
        rows: the vocabulary size of that base model; if it is not an int, nothing is checked.
        source: the prompt's name, for error messages.
    """
    if type(rows) is int and structure.vocabulary < rows:
        raise PromptMismatchError(
            "the model has a smaller vocabulary than the base model that the prompt was trained with.",
            "Load the base model that the prompt was trained with; if tokens were added for training, add them and call "
            "`resize_token_embeddings` first.",
            prompt=f"{rows} tokens ({source})",
            model=f"{structure.vocabulary} tokens",
        )
