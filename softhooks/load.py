"""Load a saved prompt onto its base model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.attach import attach_prompt
from softhooks.backbone.placeholder_ids import saved_placeholder_ids
from softhooks.backbone.stack import ModelStructure
from softhooks.checks.attach_arguments import require_model
from softhooks.formats.find import find
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods import cartridge
from softhooks.methods.cartridge import Cartridge
from softhooks.methods.stored_method import check_fit, method_of
from softhooks.prompt import SoftPrompt
from softhooks.prompt_encoder import PromptEncoder
from softhooks.runtime.added_tokens import AddedTokens, copy_rows, take_rows
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompt_parts import PromptSource

__all__ = ["Cartridge", "attach_found", "attach_stored", "load"]


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    freeze_dropout: bool = False,
    injection: Injection | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    strict: bool = True,
    example: Mapping[str, Any] | None = None,
) -> SoftPrompt:
    """Load a saved prompt onto its base model and activate it.

    Args:
        model: the base model, unmodified.
        path: a directory or Hub repository that contains a prompt saved by `save_pretrained` or a Trainer, or a PEFT adapter for
            prompt tuning, prefix tuning, P-tuning, CPT, LLaMA-Adapter or cartridges.
        name: the name of the prompt on the model.
        trainable: keep the prompt trainable. Otherwise the prompt is frozen like the model, and `verify_frozen` is not
            available.
        freeze_dropout, injection, example: as in `attach`.
        revision, token: the revision of the Hub repository (a branch, a tag or a commit), and the access token. The attribute
            `loaded_from` of the returned prompt has the commit.
        strict: refuse a base model whose weights differ, except in precision, from those that the prompt was trained with. For
            this comparison, the saved prompt contains a few values of each weight.

    Raises:
        CheckpointError: there is no prompt, or its file is damaged or inconsistent.
        PromptMismatchError: the prompt does not fit the model, or was trained with another base model.
        AttachError: the prompt fits the model but cannot be attached to it. After any error the model is unchanged.
    """
    require_model(model)
    stored = find(path, revision, token)
    return attach_found(
        model,
        stored,
        name,
        trainable=trainable,
        freeze_dropout=freeze_dropout,
        injection=injection,
        strict=strict,
        example=example,
    )


def attach_found(model: nn.Module, stored: StoredPrompt, name: str, **options: Any) -> SoftPrompt:
    """Attach a prompt that was found by its path; `options` are those of `attach_stored`."""
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base model were trained with this prompt "
            f"({', '.join(map(repr, stored.also_trained[:3]))}, ...), but are not saved with it; load them separately.",
            stacklevel=3,
        )
    return attach_stored(model, stored, name, **options)


def attach_stored(
    model: nn.Module,
    stored: StoredPrompt,
    name: str,
    *,
    trainable: bool = False,
    freeze_dropout: bool = False,
    injection: Injection | None = None,
    strict: bool = True,
    parts: Sequence[StoredPrompt] = (),
    example: Mapping[str, Any] | None = None,
) -> SoftPrompt:
    """Attach a prompt that was read from a file; see `load`. `parts` are the cartridges that it consists of, if any."""
    method = method_of(stored)
    prompt = attach_prompt(
        model,
        method,
        name,
        _PromptFile(stored, method, trainable, strict, parts),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=trainable,
        example=example,
    )
    prompt.heads.requires_grad_(trainable)
    if prompt.added is not None:
        prompt.added.requires_grad_(trainable)
    prompt.loaded_from = stored.loaded_from
    return prompt


class _PromptFile(PromptSource):
    def __init__(
        self, stored: StoredPrompt, method: Method, trainable: bool, strict: bool, parts: Sequence[StoredPrompt]
    ) -> None:
        super().__init__(method)
        self.name = stored.source
        self.head_states = stored.heads
        self.labels = stored.labels
        self._stored = stored
        self._trainable = trainable
        self._strict = strict
        self._parts = parts

    def check_fit(self, structure: ModelStructure) -> None:
        check_fit(self._stored, self.method, structure, strict=self._strict)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        if self._trainable:
            return self.method.rebuild(structure, self._stored.tables)
        return self.method.folded_encoder(self._stored.tables).requires_grad_(False)

    def ids_and_conventions(
        self, model: nn.Module, structure: ModelStructure, encoder: PromptEncoder, needs_ids: bool
    ) -> tuple[Tensor | None, dict[str, Any]]:
        count = self.method.num_virtual_tokens
        return saved_placeholder_ids(model, structure, count, self._stored.conventions, self.name, needed=needs_ids)

    def added_tokens(self, model: nn.Module, structure: ModelStructure) -> AddedTokens | None:
        return copy_rows(self._stored.added_ids, model, structure) if self._stored.added_ids else None

    def fill_added_tokens(self, added: AddedTokens) -> None:
        take_rows(added, self._stored.added, self._stored.source)

    def check_base(self, model: nn.Module, structure: ModelStructure) -> None:
        for part in self._parts:
            part.require_base(model, structure, override="or leave this one out")
        if self._strict and not self._parts:
            self._stored.require_base(model, structure)


# `Cartridge.concatenate` attaches a prompt, but methods cannot import `attach`, which is in a higher layer
cartridge.attach_joined = attach_stored
