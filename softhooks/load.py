"""Save and load prompts.

`soft_prompt.safetensors` holds the folded prompt and its heads in fp32, and in its metadata everything else: method, options,
conventions, the base model's shape. So one rename makes a save complete. `soft_prompt.json` is the same description, to be read
by people and tools.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from softhooks.attach import attach_encoder
from softhooks.backbone.added_vocabulary import say_unsaved
from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.check import about_base, require_base
from softhooks.base_model.fingerprint import Fingerprint, take, without_rows
from softhooks.compat.peft import home, unwrapped
from softhooks.compat.sharding import shards
from softhooks.formats.find import find
from softhooks.formats.native import write_stored
from softhooks.formats.stack_outline import outline
from softhooks.formats.stored import Stored
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_tokens import copy_rows, take_rows
from softhooks.runtime.attached_prompt import Injection

# --- save -------------------------------------------------------------------------------------------------------------


def save(prompt: SoftPrompt, folder: Path) -> None:
    """Write a prompt, folded, with its heads.

    Raises:
        NotAttachedError: the prompt was removed.
    """
    write_stored(stored_of(prompt), folder)
    saved = () if prompt.added is None else frozenset(prompt.added.ids.tolist())
    say_unsaved(prompt, prompt.name, prompt.model, prompt.prompted_model.structure, saved)


def stored_of(prompt: SoftPrompt) -> Stored:
    """A prompt as a file would hold it: folded, its heads by their path in the transformers model.

    Raises:
        NotAttachedError: the prompt was removed.
    """
    prompt._require_attached()
    structure, model = prompt.prompted_model.structure, unwrapped(prompt.model)
    inner = home(prompt.model)
    return Stored(
        prompt.method,
        prompt.encoder.folded(),
        {key.replace("/", ".").removeprefix(inner): head.state_dict() for key, head in prompt.heads.items()},
        prompt.stored_conventions,
        prompt.name,
        outline(structure),
        also_trained=[name for name, _ in prompt.named_parameters() if not is_prompt_key(name)],
        base={
            **about_base(model),
            "fingerprint": _fingerprint(prompt).to_json(),
            "width": structure.entry.width,
            "vocabulary": structure.vocabulary,
            "slides": bool(getattr(getattr(model, "config", None), "sliding_window", None)),
        },
        labels=prompt.prompted_model.labels.of(prompt),
        added={} if prompt.added is None else prompt.added.tables(),
        added_ids=() if prompt.added is None else tuple(prompt.added.ids.tolist()),
        is_file=False,
    )


def _fingerprint(prompt: SoftPrompt) -> Fingerprint:
    """The fingerprint of a prompt's base; of a sharded one, of which a process has parts, the one that was taken at attach."""
    prompted = prompt.prompted_model
    kept = prompted.fingerprint if shards(prompted.model) else None
    own = frozenset(prompt.added.ids.tolist()) if prompt.added is not None else ()
    return without_rows(kept or take(prompted.model, prompted.structure, frozen=True), own)


# --- load -------------------------------------------------------------------------------------------------------------


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
    """Load a saved prompt onto its base model and turn it on.

    Args:
        model: the base model, unmodified.
        path: a directory that `save_pretrained`, `Trainer.save_model` or a Trainer's checkpoint wrote; one that PEFT wrote for
            prompt tuning, P-tuning, prefix tuning, CPT or a cartridge; or a repository on the hub.
        name: under which to attach it.
        trainable: go on training it. Otherwise its parameters are frozen too, and no record of the base is taken.
        freeze_dropout, injection: as in `attach`.
        revision, token: for the hub.
        strict: refuse a base model that has other weights than the one that the prompt was trained with. A few of its numbers are
            stored with the prompt and compared; conversions of precision do not count, and files without them are not compared.

    Returns:
        the handle.

    Raises:
        CheckpointError: there is no prompt, or its file is truncated, foreign or hostile.
        PromptMismatchError: the prompt does not fit the model, or the model is another base.
        AttachError: it fits and cannot be attached. The model is as it was, whatever is raised.
    """
    stored = find(path, revision, token)
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained beside this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...) and are not saved with it; load them too.",
            stacklevel=2,
        )
    return attach_stored(
        model, stored, name, trainable=trainable, freeze_dropout=freeze_dropout, injection=injection, strict=strict
    )


def attach_stored(
    model: nn.Module,
    stored: Stored,
    name: str,
    *,
    trainable: bool = False,
    freeze_dropout: bool = False,
    injection: Injection | None = None,
    strict: bool = True,
    parts: Sequence[Stored] = (),
) -> SoftPrompt:
    """Attach a prompt that was read. See `load`.

    Args:
        parts: the prompts that it was put together from, each of which knows its base.
    """

    def check_base(structure: ModelStructure) -> None:
        for part in parts:
            require_base(part, model, structure, override="or leave this one out")
        if not parts:
            require_base(stored, model, structure, strict=strict)

    prompt = attach_encoder(
        model,
        stored.method,
        name,
        make=lambda structure: stored.encoder(structure, trainable),
        conventions=stored.conventions,
        head_states=stored.heads,
        source=stored.source,
        labels=stored.labels,
        make_added=lambda structure: copy_rows(stored.added_ids, model, structure) if stored.added_ids else None,
        take_added=lambda own: take_rows(own, stored.added, stored.source),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=trainable,
        check=lambda structure: stored.check_fit(structure, strict=strict),
        check_base=check_base,
    )
    prompt.heads.requires_grad_(trainable)
    if prompt.added is not None:
        prompt.added.requires_grad_(trainable)
    return prompt
