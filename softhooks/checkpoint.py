"""Save and load prompts.

`soft_prompt.safetensors` holds the folded prompt and its heads in fp32, and in its metadata everything else: method, options,
conventions, the base model's shape. So one rename makes a save complete. `soft_prompt.json` is the same description, to be read
by people and tools.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import softhooks
from softhooks.attach import attach_encoder
from softhooks.errors import CheckpointError, SoftHooksError, explain
from softhooks.files import parse_json, read_tensors, write_json, write_tensors
from softhooks.host import CONTAINER
from softhooks.method import Method, TableEncoder
from softhooks.methods import METHODS
from softhooks.prompt import Injection, SoftPrompt

DESCRIPTION = "soft_prompt.json"
TENSORS = "soft_prompt.safetensors"
FORMAT = "softhooks"
FORMAT_VERSION = 1
_PROMPT, _HEAD = "prompt.", "head."
_PLACEMENTS = ("front", "after_first", "end")


@dataclass
class Stored:
    """A prompt as a file holds it, checked but not yet on a model.

    Attributes:
        method: its options, without those that only say where it started.
        tables: the folded prompt by group, [P, numbers].
        heads: state dicts of its heads, by path.
        conventions: what it takes for granted about the pass.
        source: where it was read.
        also_trained: names of base parameters that were trained beside it, and are not in the file.
    """

    method: Method
    tables: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    conventions: dict[str, Any]
    source: str
    base: dict[str, Any] = field(default_factory=dict)
    also_trained: list[str] = field(default_factory=list)


# --- save -------------------------------------------------------------------------------------------------------------


def save(prompt: SoftPrompt, folder: Path) -> None:
    """Write a prompt, folded, with its heads.

    Raises:
        NotAttachedError: the prompt was removed.
    """
    prompt._require_attached()
    tensors = {_PROMPT + group: table for group, table in prompt.encoder.folded().items()}
    for key, head in prompt.heads.items():
        for name, value in head.state_dict().items():
            tensors[f"{_HEAD}{key.replace('/', '.')}:{name}"] = value
    description = describe(prompt)
    description["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / TENSORS, tensors, {"format": "pt", FORMAT: json.dumps(description)})
    write_json(folder / DESCRIPTION, description)


def describe(prompt: SoftPrompt) -> dict[str, Any]:
    """Say everything about a prompt but its numbers."""
    anatomy = prompt.host.anatomy
    config = getattr(prompt.model, "config", None)
    also = [name for name, _ in prompt.named_parameters() if not name.startswith(f"{CONTAINER}.")]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": prompt.method.kind,
        "options": prompt.method.options(),
        "conventions": prompt.conventions,
        "heads": [key.replace("/", ".") for key in prompt.heads],
        "also_trained": also,
        "base": {
            "class": type(prompt.model).__name__,
            "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
            "width": anatomy.entry.width,
            "vocabulary": anatomy.vocabulary,
            "sites": {stack.name: len(stack.sites) for stack in anatomy.stacks},
        },
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
) -> SoftPrompt:
    """Load a saved prompt onto its base model and turn it on.

    Args:
        model: the base model, unmodified.
        path: a directory that `save_pretrained`, `Trainer.save_model` or a Trainer's checkpoint wrote; one that PEFT wrote for
            prompt tuning or prefix tuning; or a repository on the hub.
        name: under which to attach it.
        trainable: go on training it. Otherwise its parameters are frozen too, and no record of the base is taken.
        freeze_dropout, injection: as in `attach`.
        revision, token: for the hub.

    Returns:
        the handle.

    Raises:
        CheckpointError: there is no prompt, or its file is truncated, foreign or hostile.
        PromptMismatchError: the prompt does not fit the model.
        AttachError: it fits and cannot be attached. The model is as it was, whatever is raised.
    """
    stored = read(Path(path) if Path(path).exists() else _download(str(path), revision, token))
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained beside this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...) and are not saved with it; load them too.",
            stacklevel=2,
        )
    prompt = attach_encoder(
        model,
        stored.method,
        name,
        encoder=TableEncoder(stored.tables).requires_grad_(trainable),
        conventions=stored.conventions,
        head_states=stored.heads,
        source=stored.source,
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=trainable,
    )
    prompt.heads.requires_grad_(trainable)
    return prompt


def read(folder: Path) -> Stored:
    """Read a prompt from a directory, in either format, and check it.

    Raises:
        CheckpointError: there is none, or it is not what it says.
    """
    if (folder / TENSORS).is_file():
        return _read_own(folder / TENSORS)
    from softhooks import peft_format

    if (folder / peft_format.CONFIG).is_file():
        return peft_format.read(folder)
    raise CheckpointError(
        explain(
            "a saved prompt is a directory with its tensors.",
            "Give the directory that `save_pretrained` wrote.",
            directory=folder,
            expected=f"{TENSORS} or {peft_format.CONFIG}",
        )
    )


def _read_own(path: Path) -> Stored:
    tensors, metadata = read_tensors(path)
    if FORMAT not in metadata:
        raise CheckpointError(f"{path} must be written by softhooks; its metadata does not say so.")
    description = parse_json(metadata[FORMAT], str(path))
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this softhooks reads {FORMAT_VERSION}. Upgrade it."
        )
    tables: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_PROMPT):
            tables[name.removeprefix(_PROMPT)] = tensor
        elif name.startswith(_HEAD) and ":" in name:
            head, parameter = name.removeprefix(_HEAD).split(":", 1)
            heads.setdefault(head, {})[parameter] = tensor
        else:
            raise CheckpointError(f"{path} must hold prompts and heads only; it holds {name!r}.")
    method = _method(description, tables, str(path))
    return Stored(
        method=method,
        tables=tables,
        heads=heads,
        conventions=_conventions(description.get("conventions"), str(path)),
        source=str(path),
        base=description["base"] if isinstance(description.get("base"), dict) else {},
        also_trained=[str(item) for item in description.get("also_trained") or []],
    )


def _method(description: dict[str, Any], tables: dict[str, Tensor], source: str) -> Method:
    """Rebuild the options; how the prompt was started no longer matters."""
    kind, options = description.get("method"), description.get("options")
    if kind not in METHODS or not isinstance(options, dict):
        raise CheckpointError(f"{source} must name a method of {sorted(METHODS)}; it names {kind!r}.")
    cls = METHODS[kind]
    known = {item.name for item in dataclasses.fields(cls)} - set(cls.start_options)
    rows = {table.shape[0] for table in tables.values() if table.dim() == 2}
    try:
        method = cls(**{key: value for key, value in options.items() if key in known})
    except (SoftHooksError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} must hold valid options for {kind}; it does not: {error}") from error
    if rows != {method.num_virtual_tokens}:
        raise CheckpointError(
            f"{source} says {method.num_virtual_tokens} virtual tokens; its tensors have {sorted(rows)} rows."
        )
    return method


def _conventions(value: Any, source: str) -> dict[str, Any]:
    checks = {
        "placement": lambda v: v in _PLACEMENTS,
        "shift_positions": lambda v: isinstance(v, bool),
        "windowed": lambda v: isinstance(v, bool),
    }
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must say the conventions of its prompt; it does not.")
    for key, held in value.items():
        if key not in checks or not checks[key](held):
            raise CheckpointError(
                f"{source} has a convention that this softhooks does not know: {key}={held!r}. Upgrade it."
            )
    return value


def _download(repository: str, revision: str | None, token: str | None) -> Path:
    """Fetch the few files of a prompt from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from softhooks import peft_format

    wanted = [DESCRIPTION, TENSORS, peft_format.CONFIG, peft_format.TENSORS]
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            explain(
                "a prompt is loaded from a directory or from a repository on the hub.",
                "Check the path; a directory must exist on this machine.",
                asked=repository,
                hub=f"{type(error).__name__}: {error}",
            )
        ) from error
