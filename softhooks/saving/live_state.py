"""The live state: the tensors of a prompt in a Trainer's checkpoint, from which training resumes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.formats.files import write_json, write_tensors
from softhooks.formats.softhooks_files import LIVE
from softhooks.prompt import SoftPrompt

DESCRIPTION = "description"
"""The name of the checkpoint's entry that describes the prompt, its base model and its optimizer."""

_NOTE = "A soft prompt, not a model. Load the base model, then this directory with softhooks.load(model, directory)."


def live_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Return a prompt's trainable parameters and its encoder's state dict, by their names in the model."""
    encoder = f"{CONTAINER}.{prompt.name}.encoder."
    kept = {f"{encoder}{name}": tensor for name, tensor in prompt.encoder.state_dict().items()}
    ids = prompt.module._buffers.get(BUFFER)
    if ids is not None:
        kept[f"{CONTAINER}.{prompt.name}.{BUFFER}"] = ids
    return kept | {name: parameter.detach() for name, parameter in prompt.named_parameters()}


class NotSaved(Collection[str]):
    """The keys of a model's state dict that its checkpoints omit; the Trainer does not warn that these keys are missing.

    They are computed on each access, because a checkpoint contains the whole model once the prompt has been removed.
    """

    def __init__(self, prompt: SoftPrompt) -> None:
        self._prompt = prompt

    def _keys(self) -> list[str]:
        if not self._prompt.is_attached:
            return []
        live = live_tensors(self._prompt)
        return [key for key in self._prompt.model.state_dict() if key not in live]

    def __len__(self) -> int:
        return len(self._keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()


def write_live(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors of prompts, and an index that names their file.

    The index has no `metadata`: a Trainer can still resume from it, but `from_pretrained` raises an error. If the file were
    named `model.safetensors`, `from_pretrained` would load it and initialize the missing base weights randomly.
    """
    write_tensors(folder / LIVE, state, {"format": "pt"})
    weight_map = dict.fromkeys((name for name in state if not name.endswith(f".{DESCRIPTION}")), LIVE)
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"about": _NOTE, "weight_map": weight_map})
