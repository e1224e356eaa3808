"""What of a model a checkpoint keeps, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.formats.files import write_json, write_tensors
from softhooks.prompt import SoftPrompt

LIVE = "soft_prompt.live.safetensors"
"""The file of a checkpoint with the live parameters, from which training resumes."""

DESCRIPTION = "description"
"""The entry of a live file that describes the prompt, its base and its optimizer."""

_NOTE = "A soft prompt, not a model. Load the base model, then this directory with softhooks.load(model, directory)."


def live_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Everything that training has changed, by its name in the model; what an encoder keeps in buffers too."""
    encoder = f"{CONTAINER}.{prompt.name}.encoder."
    kept = {f"{encoder}{name}": tensor for name, tensor in prompt.encoder.state_dict().items()}
    ids = prompt.module._buffers.get(BUFFER)
    if ids is not None:
        kept[f"{CONTAINER}.{prompt.name}.{BUFFER}"] = ids
    return kept | {name: parameter.detach() for name, parameter in prompt.named_parameters()}


class NotSaved(Sequence[str]):
    """The keys that a checkpoint lacks; the Trainer compares them with what it misses, and then keeps quiet.

    Made anew at each look: a prompt may come or go, and a model whose prompt is gone must be saved whole.
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

    The index is one of the files that a Trainer resumes from. `from_pretrained` stops at it, because it lacks the `metadata` of a
    model's index; a `model.safetensors` would not stop it, and a model with random weights would be built.
    """
    write_tensors(folder / LIVE, state, {"format": "pt"})
    weight_map = dict.fromkeys((name for name in state if not name.endswith(f".{DESCRIPTION}")), LIVE)
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"about": _NOTE, "weight_map": weight_map})
