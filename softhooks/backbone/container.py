"""The submodule that holds the parameters of every prompt on a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CONTAINER = "soft_prompt"
"""The name of the submodule that holds every prompt's parameters."""


def is_prompt_key(key: str, prompt: str | None = None) -> bool:
    """Whether a key of a model's state dict belongs to the named prompt, or to any prompt if no name is given."""
    return key.startswith(f"{CONTAINER}." if prompt is None else f"{CONTAINER}.{prompt}.")


class Container(nn.ModuleDict):
    """The only submodule that is added to a model; it holds the encoder and the heads of each prompt under the prompt's name.

    Attributes:
        prompted_model: the state of the model's prompts; it is not a module and so not in the state dict.
    """

    prompted_model: Any

    def _apply(self, fn: Any, recurse: bool = True) -> Container:
        """Move the prompts to another device along with the model, but keep them in fp32, because they are the master weights."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self
