"""Load a saved prompt onto its base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from softhooks.attach import attach_encoder
from softhooks.backbone.stack import ModelStructure
from softhooks.encoder import PromptEncoder
from softhooks.formats.find import find
from softhooks.formats.stored import StoredPrompt
from softhooks.methods import cartridge
from softhooks.methods.cartridge import Cartridge
from softhooks.methods.stored_fit import check_fit
from softhooks.methods.stored_options import method_of
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_tokens import copy_rows, take_rows
from softhooks.runtime.attached_prompt import Injection

__all__ = ["Cartridge", "attach_stored", "load"]


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    freeze_dropout: bool = False,
    injection: Injection | None = None,
    revision: str | None = None,
    token: str | None = None,
    strict: bool = True,
) -> SoftPrompt:
    """Load a saved prompt onto its base model and activate it.

    Args:
        model: the base model, unmodified.
        path: a directory that `save_pretrained` or a Trainer wrote; one that PEFT wrote for a prompt, a prefix, CPT, a
            LLaMA-Adapter or a cartridge; or a repository on the hub.
        name: the name to attach it under.
        trainable: continue its training. Otherwise its parameters are frozen too, and no record of the base is taken.
        freeze_dropout, injection: as in `attach`.
        revision, token: for the hub.
        strict: refuse a base model with other weights than the one that the prompt was trained with. The file holds a few numbers
            of each weight for this comparison; conversions of precision are allowed.

    Returns:
        the handle.

    Raises:
        CheckpointError: there is no prompt, or its file is damaged or contradicts itself.
        PromptMismatchError: the prompt does not fit the model, or was trained with another base model.
        AttachError: it fits but cannot be attached. After any error the model is unchanged.
    """
    stored = find(path, revision, token)
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained with this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...) and are not in its file; load them too.",
            stacklevel=2,
        )
    return attach_stored(
        model, stored, name, trainable=trainable, freeze_dropout=freeze_dropout, injection=injection, strict=strict
    )


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
) -> SoftPrompt:
    """Attach a prompt that was read from a file. See `load`.

    Args:
        parts: the prompts that it was joined from; each one's base model is compared.
    """
    method = method_of(stored)

    def make(structure: ModelStructure) -> PromptEncoder:
        if trainable:
            return method.rebuild(structure, stored.tables)
        return method.folded_encoder(stored.tables).requires_grad_(False)

    def check_base(structure: ModelStructure) -> None:
        for part in parts:
            part.require_base(model, structure, override="or leave this one out")
        if strict and not parts:
            stored.require_base(model, structure)

    prompt = attach_encoder(
        model,
        method,
        name,
        make=make,
        conventions=stored.conventions,
        head_states=stored.heads,
        source=stored.source,
        labels=stored.labels,
        make_added=lambda structure: copy_rows(stored.added_ids, model, structure) if stored.added_ids else None,
        take_added=lambda own: take_rows(own, stored.added, stored.source),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=trainable,
        check=lambda structure: check_fit(stored, method, structure, strict=strict),
        check_base=check_base,
    )
    prompt.heads.requires_grad_(trainable)
    if prompt.added is not None:
        prompt.added.requires_grad_(trainable)
    return prompt


cartridge.attach_joined = attach_stored
