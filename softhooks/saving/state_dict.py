"""What of a model a checkpoint keeps, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.prompt import SoftPrompt


def live_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Everything that training has changed, by its name in the model; what an encoder keeps in buffers too."""
    encoder = f"{CONTAINER}.{prompt.name}.encoder."
    kept = {f"{encoder}{name}": tensor for name, tensor in prompt.encoder.state_dict().items()}
    ids = prompt._module._buffers.get(BUFFER)
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
