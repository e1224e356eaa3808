"""Read saved and attached prompts, to initialize a new prompt from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import OptionError
from softhooks.formats.find import find
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods.stored_method import method_of
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder


@runtime_checkable
class Handle(Protocol):
    """The attributes of a `SoftPrompt` that this module uses."""

    name: str
    method: Method
    is_attached: bool

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""

    @property
    def stored_conventions(self) -> dict[str, Any]:
        """The assumptions about the forward pass that are saved with the prompt."""

    def to_stored(self) -> StoredPrompt:
        """Return the prompt as it would be saved."""


def read_checked(path: str | Path) -> tuple[StoredPrompt, Method]:
    """Return a saved prompt and its method."""
    return with_all_options(find(path))


def with_all_options(stored: StoredPrompt) -> tuple[StoredPrompt, Method]:
    """Return a saved prompt, with defaults for the options that its file does not contain, and its method."""
    method = method_of(stored)
    return replace(stored, options=method.options()), method


def rows_of(
    source: Any, purpose: str = "be used to initialize another prompt", *, structure: ModelStructure | None = None
) -> Tensor:
    """Return the embeddings of a prompt, [P, H].

    Args:
        source: a `SoftPrompt`; a directory or repository that `load` reads, including PEFT's; or the embeddings themselves.
        purpose: the end of an error message, "so it cannot {purpose}".
        structure: the structure of a model; an error is raised if the embeddings were trained on another base model.
    """
    if isinstance(source, Tensor):
        return source.detach().float()
    if isinstance(source, (str, Path)):
        stored, _ = read_checked(source)
        known: StoredPrompt | None = stored
        tables, name = stored.tables, f"{stored.source} ({stored.kind})"
    elif isinstance(source, Handle):
        known = source.to_stored() if source.is_attached else None
        tables, name = source.encoder.folded(), f"{source.name!r} ({source.method.kind})"
    else:
        raise OptionError(
            f"the prompt is of type {type(source).__name__}; it must be a SoftPrompt, a directory, a repository or a tensor."
        )
    if set(tables) != {EMBEDDINGS}:
        raise OptionError(
            f"the prompt {name} has other tensors ({', '.join(sorted(tables))}) instead of embeddings, so it cannot {purpose}.",
            "Use a prompt that was trained with PromptTuning, or with another method that trains embeddings.",
        )
    rows = tables[EMBEDDINGS].detach().float()
    if structure is not None and known is not None and rows.shape[1] == structure.entry.width:
        known.require_base(structure.entry.module, structure, override="or pass its embeddings as a tensor")
    return rows


def word_ids_of(source: Any) -> list[int] | None:
    """Return the token ids that are saved for a prompt's virtual tokens, or None if there are none."""
    if isinstance(source, (str, Path)):
        conventions = find(source).conventions
    else:
        conventions = source.stored_conventions if isinstance(source, Handle) else {}
    return conventions.get(BUFFER)
