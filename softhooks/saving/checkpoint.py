"""Save and load prompts.

`soft_prompt.safetensors` holds the folded prompt and its heads in fp32, and in its metadata everything else: method, options,
conventions, the base model's shape. So one rename makes a save complete. `soft_prompt.json` is the same description, to be read
by people and tools.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import softhooks
from softhooks.added_tokens import copy_rows, take_rows
from softhooks.anatomy import Anatomy
from softhooks.attach import attach_encoder
from softhooks.errors import CheckpointError
from softhooks.fingerprint import Fingerprint, take, without_rows
from softhooks.host import CONTAINER
from softhooks.peft_base import home
from softhooks.probe import unwrapped
from softhooks.prompt import Injection, SoftPrompt
from softhooks.saving.base_check import about_base, require_base
from softhooks.saving.files import write_json, write_tensors
from softhooks.saving.missing import explain_missing
from softhooks.saving.outline import outline
from softhooks.saving.stored import ADDED, FORMAT, FORMAT_VERSION, HEAD, PROMPT, Stored, read_own
from softhooks.trainer.sharding import shards
from softhooks.vocabulary import say_unsaved

DESCRIPTION = "soft_prompt.json"
TENSORS = "soft_prompt.safetensors"


# --- save -------------------------------------------------------------------------------------------------------------


def save(prompt: SoftPrompt, folder: Path) -> None:
    """Write a prompt, folded, with its heads.

    Raises:
        NotAttachedError: the prompt was removed.
    """
    write_stored(stored_of(prompt), folder)
    say_unsaved(prompt)


def write_stored(stored: Stored, folder: Path) -> None:
    """Write a prompt that may be on no model."""
    tensors = {PROMPT + group: table for group, table in stored.tables.items()}
    for path, state in stored.heads.items():
        for name, value in state.items():
            tensors[f"{HEAD}{path}:{name}"] = value
    tensors |= {ADDED + name: table for name, table in stored.added.items()}
    description = describe(stored)
    description["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / TENSORS, tensors, {"format": "pt", FORMAT: json.dumps(description)})
    known = description["base"].get("fingerprint")
    if known is not None:  # its numbers say nothing to people
        description["base"] = {**description["base"], "fingerprint": known["digest"]}
    write_json(folder / DESCRIPTION, description)


def stored_of(prompt: SoftPrompt) -> Stored:
    """A prompt as a file would hold it: folded, its heads by their path in the transformers model.

    Raises:
        NotAttachedError: the prompt was removed.
    """
    prompt._require_attached()
    anatomy, model = prompt.host.anatomy, unwrapped(prompt.model)
    inner = home(prompt.model)
    return Stored(
        prompt.method,
        prompt.encoder.folded(),
        {key.replace("/", ".").removeprefix(inner): head.state_dict() for key, head in prompt.heads.items()},
        prompt.stored_conventions,
        prompt.name,
        outline(anatomy),
        also_trained=[name for name, _ in prompt.named_parameters() if not name.startswith(f"{CONTAINER}.")],
        base={
            **about_base(model),
            "fingerprint": _fingerprint(prompt).to_json(),
            "width": anatomy.entry.width,
            "vocabulary": anatomy.vocabulary,
            "slides": bool(getattr(getattr(model, "config", None), "sliding_window", None)),
        },
        labels=prompt.host.labels.of(prompt),
        added={} if prompt.added is None else prompt.added.tables(),
        added_ids=() if prompt.added is None else tuple(prompt.added.ids.tolist()),
        is_file=False,
    )


def _fingerprint(prompt: SoftPrompt) -> Fingerprint:
    """The fingerprint of a prompt's base; of a sharded one, of which a process has parts, the one that was taken at attach."""
    host = prompt.host
    kept = host.fingerprint if shards(host.model) else None
    own = frozenset(prompt.added.ids.tolist()) if prompt.added is not None else ()
    return without_rows(kept or take(host.model, host.anatomy, frozen=True), own)


def describe(stored: Stored) -> dict[str, Any]:
    """Say everything about a prompt but its numbers."""
    labels = None if stored.labels is None else stored.labels.described(stored.heads)
    return {
        **({} if labels is None else {"labels": labels}),
        **({"added_tokens": list(stored.added_ids)} if stored.added_ids else {}),
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": stored.method.kind,
        "options": stored.method.options(),
        "conventions": stored.conventions,
        "heads": list(stored.heads),
        "also_trained": stored.also_trained,
        "base": {**stored.base, "stacks": stored.stacks},
        "versions": {
            "softhooks": softhooks.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


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

    def check_base(anatomy: Anatomy) -> None:
        for part in parts:
            require_base(part, model, anatomy, override="or leave this one out")
        if not parts:
            require_base(stored, model, anatomy, strict=strict)

    prompt = attach_encoder(
        model,
        stored.method,
        name,
        make=lambda anatomy: stored.encoder(anatomy, trainable),
        conventions=stored.conventions,
        head_states=stored.heads,
        source=stored.source,
        labels=stored.labels,
        make_added=lambda anatomy: copy_rows(stored.added_ids, model, anatomy) if stored.added_ids else None,
        take_added=lambda own: take_rows(own, stored.added, stored.source),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=trainable,
        check=lambda anatomy: stored.check_fit(anatomy, strict=strict),
        check_base=check_base,
    )
    prompt.heads.requires_grad_(trainable)
    if prompt.added is not None:
        prompt.added.requires_grad_(trainable)
    return prompt


def find(path: str | Path, revision: str | None = None, token: str | None = None) -> Stored:
    """Read a prompt from a directory or from the hub. See `load`."""
    return read(Path(path) if _exists(Path(path)) else _download(str(path), revision, token))


def read(folder: Path) -> Stored:
    """Read a prompt from a directory, in either format, and check it.

    Raises:
        CheckpointError: there is none, or it is not what it says.
    """
    if (folder / TENSORS).is_file():
        return read_own(folder / TENSORS)
    from softhooks.saving import peft_format

    if (folder / peft_format.CONFIG).is_file():
        return peft_format.read(folder)
    raise explain_missing(folder, (TENSORS, peft_format.CONFIG))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def _download(repository: str, revision: str | None, token: str | None) -> Path:
    """Fetch the few files of a prompt from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from softhooks.saving import peft_format

    wanted = [DESCRIPTION, TENSORS, peft_format.CONFIG, peft_format.TENSORS]
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "a prompt is loaded from a directory or from a repository on the hub.",
            "Check the path; a directory must exist on this machine.",
            asked=repository,
            hub=f"{type(error).__name__}: {error}",
        ) from error
