"""Build the module of a prompt (its encoder, heads and added tokens) from a method or a file."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softhooks.backbone.added_vocabulary import warn_about_added_rows
from softhooks.backbone.heads import copy_heads, find_heads, load_heads
from softhooks.backbone.placeholder_ids import BUFFER, new_placeholder_ids
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of
from softhooks.compat.peft import path_in_wrapper
from softhooks.formats.labels import Labels
from softhooks.layout.tokenizing import tokenizer_of
from softhooks.method import Method
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder
from softhooks.runtime.added_tokens import ADDED, AddedTokens, chosen_ids, copy_rows


class PromptSource:
    """The source of a prompt: a method (`NewPrompt`), or a file (see `softhooks/load.py`).

    Attributes:
        name: the name of the source in error messages.
        head_states: the saved state dicts of heads, by path in the transformers model, or None to copy the heads
            that are newly initialized in the model.
        labels: the saved label names of the heads, or None for the model's own names.
    """

    name = "given"
    head_states: dict[str, dict[str, Tensor]] | None = None
    labels: Labels | None = None

    def __init__(self, method: Method) -> None:
        self.method = method

    def check_fit(self, structure: ModelStructure) -> None:
        """Check that a saved prompt fits the structure of a model."""

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Build the encoder for a model."""
        return self.method.build(structure)

    def ids_and_conventions(
        self, model: nn.Module, structure: ModelStructure, encoder: PromptEncoder, needs_ids: bool
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the ids of the virtual tokens, [P] (None if the model needs no ids), and the result of `Method.conventions`."""
        conventions = self.method.conventions(structure)
        if not needs_ids:
            return None, conventions
        known = encoder.start_ids
        rows = encoder.folded().get(EMBEDDINGS) if known is None else None
        return new_placeholder_ids(model, structure, self.method.num_virtual_tokens, known, rows), conventions

    def added_tokens(self, model: nn.Module, structure: ModelStructure) -> AddedTokens | None:
        """Copy the embeddings of added tokens that the prompt trains, if any."""
        raise NotImplementedError

    def fill_added_tokens(self, added: AddedTokens) -> None:
        """Replace the copies with saved embeddings. Called after the copies were checked against the originals."""

    def check_base(self, model: nn.Module, structure: ModelStructure) -> None:
        """Check that a saved prompt was made for this base model. Called after the prompt's heads were loaded."""


class NewPrompt(PromptSource):
    """A new prompt, initialized by its method; the arguments are as in `attach`."""

    def __init__(self, method: Method, train_head: bool, train_added_tokens: Any) -> None:
        super().__init__(method)
        self.head_states = None if train_head else {}
        self._train_added_tokens = train_added_tokens

    def added_tokens(self, model: nn.Module, structure: ModelStructure) -> AddedTokens | None:
        """Copy the embeddings that `train_added_tokens` selects."""
        chosen, tokenizer = self._train_added_tokens, getattr(self.method, "tokenizer", None)
        if chosen is True and tokenizer is not None:
            chosen = tokenizer_of(tokenizer)
        ids = chosen_ids(chosen, model, structure)
        return copy_rows(ids, model, structure) if ids else None


def build_module(
    model: nn.Module, structure: ModelStructure, source: PromptSource, encoder: PromptEncoder, needs_ids: bool
) -> tuple[nn.ModuleDict, dict[str, Any], dict[str, nn.Module]]:
    """Build the module of a prompt; also return the prompt's conventions and, by path, the model's heads that it copies."""
    encoder.to(device_of(structure.entry.embedding))
    module = nn.ModuleDict({"encoder": encoder})
    ids, conventions = source.ids_and_conventions(model, structure, encoder, needs_ids)
    if ids is not None:
        module.register_buffer(BUFFER, ids.to(encoder.device))
    heads, states = find_heads(model, structure), source.head_states
    if states is not None:
        states = {path_in_wrapper(model) + path: state for path, state in states.items()}
        heads = {path: head for path, head in heads.items() if path in states}
    module["heads"] = own = copy_heads(heads)
    load_heads(own, states or {}, source.name)
    added = source.added_tokens(model, structure)
    if added is not None:
        module[ADDED] = added
    warn_about_added_rows(model, structure, () if added is None else frozenset(added.ids.tolist()))
    source.check_base(model, structure)
    return module.train(model.training), conventions, heads
