"""The live state of a prompt, from which training resumes: its tensors, and their file in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.formats.files import write_json, write_tensors
from softhooks.formats.softhooks_files import LIVE
from softhooks.prompt import SoftPrompt

DESCRIPTION = "description"
"""The metadata entry of a live file that describes the prompt, its base model and its optimizer."""

_NOTE = "A soft prompt, not a model. Load the base model, then this directory with softhooks.load(model, directory)."


def live_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Return the trained tensors and the encoder's buffers, by their names in the model."""
    encoder = f"{CONTAINER}.{prompt.name}.encoder."
    kept = {f"{encoder}{name}": tensor for name, tensor in prompt.encoder.state_dict().items()}
    ids = prompt.module._buffers.get(BUFFER)
    if ids is not None:
        kept[f"{CONTAINER}.{prompt.name}.{BUFFER}"] = ids
    return kept | {name: parameter.detach() for name, parameter in prompt.named_parameters()}


class NotSaved(Sequence[str]):
    """The keys of a model's state dict that are not saved in a checkpoint; the Trainer does not warn about them.

    The keys are computed at each access, because prompts may be added and removed; without prompts, the whole model is saved.
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

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._keys()[index]


def write_live(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the live parameters, and an index that names their file.

    A Trainer can resume from the index. `from_pretrained` raises an error, because the index lacks the `metadata` of a model's
    index; from a `model.safetensors` it would instead build a model with random weights.
    """
    write_tensors(folder / LIVE, state, {"format": "pt"})
    weight_map = dict.fromkeys((name for name in state if not name.endswith(f".{DESCRIPTION}")), LIVE)
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"about": _NOTE, "weight_map": weight_map})
