"""Initialization of a new prompt from a saved or attached prompt."""

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
from softhooks.methods.stored_options import method_of
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder


@runtime_checkable
class Handle(Protocol):
    """A prompt on a model, as `attach` and `load` return it."""

    name: str
    method: Method
    is_attached: bool

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""

    @property
    def stored_conventions(self) -> dict[str, Any]:
        """The conventions as they are saved."""

    def to_stored(self) -> StoredPrompt:
        """Return the prompt as it would be saved."""


def read_checked(path: str | Path) -> tuple[StoredPrompt, Method]:
    """Read a saved prompt and make its method; default options are filled in."""
    return with_all_options(find(path))


def with_all_options(stored: StoredPrompt) -> tuple[StoredPrompt, Method]:
    """Make the method of a stored prompt, and fill in the options that its file leaves out, as PEFT's files do."""
    method = method_of(stored)
    return replace(stored, options=method.options()), method


def rows_of(
    source: Any, purpose: str = "be used to initialize another prompt", *, structure: ModelStructure | None = None
) -> Tensor:
    """Return the embedding rows of a prompt, [P, H].

    Args:
        source: a handle; a directory or repository that `load` reads, including PEFT's; or the rows themselves.
        purpose: the purpose of the rows, for the error.
        structure: the structure of the new prompt's model, which must be the base model that the rows were trained with.
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
        raise OptionError(f"a {type(source).__name__} was given as a prompt; pass a handle, a directory or a tensor.")
    if set(tables) != {EMBEDDINGS}:
        raise OptionError(
            f"the prompt {name} contains {', '.join(sorted(tables))} instead of embedding rows, so it cannot {purpose}.",
            "Use a prompt of PromptTuning or of another method that enters as embeddings.",
        )
    rows = tables[EMBEDDINGS].detach().float()
    if structure is not None and known is not None and rows.shape[1] == structure.entry.width:
        known.require_base(structure.entry.module, structure, override="or pass only its rows, as a tensor")
    return rows


def word_ids_of(source: Any) -> list[int] | None:
    """Return the ids of a prompt's virtual tokens, which are only saved if its model reads ids, or None if there are none."""
    if isinstance(source, (str, Path)):
        conventions = find(source).conventions
    else:
        conventions = source.stored_conventions if isinstance(source, Handle) else {}
    return conventions.get(BUFFER)
